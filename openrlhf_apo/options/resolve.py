"""From argv to settings: file, defaults of the loss and of the machine, OpenRLHF's checks, then ours."""

import argparse
import logging
import os
from collections.abc import Container, Iterable
from difflib import get_close_matches
from types import SimpleNamespace

import yaml

from openrlhf_apo import cpu
from openrlhf_apo.errors import LossError, OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, OPENRLHF
from openrlhf_apo.options import flags, owners
from openrlhf_apo.options.check_cluster import check_cluster
from openrlhf_apo.options.check_model import check_model
from openrlhf_apo.options.checks import check_before_openrlhf, check_data_files, check_inputs, check_settings
from openrlhf_apo.options.effects import check_values, refuse_flags_without_effect
from openrlhf_apo.options.help_page import HelpAction
from openrlhf_apo.options.openrlhf_flags import CPU_TOKENS, openrlhf_flag
from openrlhf_apo.options.own_file import OwnFile, load_own_file
from openrlhf_apo.options.owners import value_of
from openrlhf_apo.options.plan import objective
from openrlhf_apo.options.rewards import OURS, kind_of
from openrlhf_apo.options.runtime import decide_runtime
from openrlhf_apo.options.upstream import upstream_checks, upstream_parser

logger = logging.getLogger(__name__)

# What other trainers call it, where the spelling does not lead to ours.
ELSEWHERE = {
    "data": "data.prompt_dataset",
    "dataset": "data.prompt_dataset",
    "epochs": "train.max_epochs",
    "model": "actor.model_name_or_path",
    "output": "ckpt.output_dir",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise OptionError(message)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            before = self._option_string_actions.get(args[args.index(unknown[0]) - 1])
            if before is not None and before.nargs == 0 and not unknown[0].startswith("-"):
                raise OptionError(f"{before.option_strings[0]} is a switch: drop {unknown[0]!r}, or say false")
            name = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
            hint = _did_you_mean(name, self._option_string_actions)
            raise OptionError(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known names nearest to an unknown one, to go on after the error; nothing where none is near."""
    word = name.lstrip("-")
    usable = {other.lstrip("-"): other for other in known if not _refused_everywhere(other.lstrip("-"))}
    # A flag without its prefix, --batch_size, is nearer to those that end so than its spelling says.
    near = [usable[ELSEWHERE[word]]] if word in ELSEWHERE else []
    near = near or [usable[other] for other in usable if other.endswith(f".{word}")]
    near = near or get_close_matches(name, usable.values(), 1)
    return f"; did you mean {' or '.join(sorted(near)[:3])}?" if near else ""


def _refused_everywhere(flag: str) -> bool:
    entry = openrlhf_flag(flag)
    return entry is not None and all(use.kind == "refused" for use in (entry.group, entry.token, entry.openrlhf))


def resolve(
    argv: list[str], check_model_folder: bool = True, from_files: Container[str] | None = None
) -> SimpleNamespace:
    """Nested settings as OpenRLHF uses them, plus `given`: the flags set by the user or by the file, and by which.

    Raises OptionError for anything that cannot work or would have no effect. `check_model_folder=False` does not look
    at the model and the data, which may have yet to be made. from_files: those alone are taken of a --config file.
    """
    own = _own_file(argv, from_files)
    parser = make_parser()
    argv, off = _switches_off(parser, argv)
    args = parser.parse_args(argv)
    origin = dict.fromkeys([*_given(parser, argv), *off], "command line")
    for path in args.config or ():
        from_file = _read_config(parser, path)
        if from_files is not None:
            from_file = {dest: value for dest, value in from_file.items() if dest in from_files}
        origin |= {dest: path for dest in from_file if origin.get(dest) != "command line"}
        parser.set_defaults(**from_file)
    parser.set_defaults(**off)
    args = parser.parse_args(argv)
    words = getattr(args, "reward.name") or []
    if not getattr(args, "reward.remote_url") and len(words) == 1 and kind_of(words[0]) in ("file", "server"):
        setattr(args, "reward.remote_url", words[0])
        setattr(args, "reward.name", None)
        origin["reward.remote_url"] = origin.pop("reward.name")
    given = set(origin)
    cpu.decide(getattr(args, "apo.device"))
    args.loss = _loss(args, own)
    args.runtime = decide_runtime(args, given)
    for flag, value in _defaults(args, given).items():
        if flag not in given:
            setattr(args, flag, value)
    check_inputs(args)
    refuse_flags_without_effect(args, given)
    check_values(args, given)
    check_before_openrlhf(args)
    if getattr(args, "train.agent_func_path"):
        setattr(args, "reward.remote_url", "agent")  # as OpenRLHF does
    elif not getattr(args, "reward.remote_url"):
        setattr(args, "reward.remote_url", OURS)  # or OpenRLHF would score with its reward model, and with that alone
    by_tokens = getattr(args, "train.dynamic_batch_enable")
    if args.loss != OPENRLHF:
        setattr(args, "train.dynamic_batch_enable", False)  # OpenRLHF packs samples beside it, always
    generate_batch = getattr(args, "rollout.vllm_generate_batch_size")
    setattr(args, "rollout.vllm_generate_batch_size", None)  # OpenRLHF buffers a surplus in its asynchronous mode only
    parsed = vars(args).copy()
    try:
        settings, said = upstream_checks(args)
    except AssertionError as error:
        raise OptionError(str(error)) from None
    _refuse_overrides(parsed, settings, given, said)
    settings.given = dict(sorted(origin.items()))
    settings.train.dynamic_batch_enable = by_tokens
    if settings.ds.lora.target_modules == ["all-linear"]:
        settings.ds.lora.target_modules = "all-linear"  # in a list, peft takes it for a layer's name
    settings.rollout.vllm_generate_batch_size = generate_batch or settings.rollout.batch_size
    _make_paths_absolute(settings)
    check_settings(settings)
    check_cluster(settings)
    if settings.apo.load_rollouts:
        settings.vllm.num_engines = 0  # not before: OpenRLHF packs samples beside an engine only
    objective(settings)  # whose values are refused here, before transformers is imported to look at the model
    if check_model_folder:
        check_data_files(settings)
        check_model(settings)
    return settings


def _make_paths_absolute(settings: SimpleNamespace) -> None:
    """Each actor of a cluster has a working directory of its own: paths are meant from where the command was given."""
    settings.ckpt.output_dir = os.path.abspath(settings.ckpt.output_dir)
    settings.ckpt.path = os.path.abspath(settings.ckpt.path)
    if settings.apo.save_rollouts:
        settings.apo.save_rollouts = os.path.abspath(settings.apo.save_rollouts)
    for model in (settings.actor, settings.reward):
        if model.model_name_or_path and os.path.isdir(model.model_name_or_path):
            model.model_name_or_path = os.path.abspath(model.model_name_or_path)


def _refuse_overrides(parsed: dict, settings: SimpleNamespace, given: set[str], said: list[str]) -> None:
    """OpenRLHF changes settings that do not go together, and only prints it. A given flag must keep its value; a
    default that changes is said in the log."""
    for flag, before in parsed.items():
        after = value_of(settings, flag)
        if (
            before is None
            or after == before
            or (after is not None and _listed(after)[-len(_listed(before)) :] == _listed(before))
        ):
            continue  # the same, or the same as a list
        if flag in given:
            reason = next(
                (line for line in said if flag.split(".")[-1] in line), "it does not go with the other flags"
            )
            raise OptionError(f"--{flag} {before} would become {after} ({reason}): drop it, or give what it needs")
        logger.info("--%s is %s, not %s, with these flags", flag, after, before)


def _listed(value) -> list:
    return value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]


def make_parser() -> argparse.ArgumentParser:
    """OpenRLHF's parser with our flags, those of the losses loaded so far included."""
    parser = upstream_parser()
    parser.__class__ = _Parser  # OpenRLHF built it; only how it reports an error differs
    parser.prog = "python -m openrlhf_apo.cli.train_apo_ray"
    parser.allow_abbrev = False  # --apo.alpha_m would silently be --apo.alpha_max
    flags.add_flags(parser)
    parser._optionals.conflict_handler = "resolve"  # argparse's own --help goes
    parser.add_argument("-h", "--help", nargs="?", action=HelpAction, help="the flags that most need; --help all: all")
    return parser


def _own_file(argv: list[str], from_files: Container[str] | None) -> OwnFile:
    """Load the file of --loss_path, before there can be a parser with the flags that it brings."""
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss_path")
    first.add_argument("--config", nargs="+", default=[])
    known, _ = first.parse_known_args(argv)
    configs = known.config if from_files is None or "loss_path" in from_files else []
    in_files = [flatten(_yaml(config)).get("loss_path") for config in configs]
    path = known.loss_path or next(filter(None, reversed(in_files)), None)
    try:
        return load_own_file(path) if path else OwnFile()
    except LossError as error:
        raise OptionError(f"--loss_path {error}") from None


def _switches_off(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[list[str], dict[str, bool]]:
    """`--switch false` takes off what a file or a loss has set, `--switch true` is the switch: argv without these two
    words, and {dest: value} of the switches whose last word on the command line is false."""
    words: list[str] = []
    off: dict[str, bool] = {}
    for word in argv:
        before = parser._option_string_actions.get(words[-1]) if words else None
        if before is not None and before.nargs == 0 and word.lower() in ("true", "false"):
            if word.lower() == "false":
                words = [each for each in words if each not in before.option_strings]
                off[before.dest] = not before.const
            continue
        words.append(word)
        if (now := parser._option_string_actions.get(word)) is not None:
            off.pop(now.dest, None)
    return words, off


def _given(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The dests that argv sets, whatever their value."""
    blank = argparse.Namespace(**{action.dest: None for action in parser._actions})
    untouched = object()
    for action in parser._actions:
        setattr(blank, action.dest, untouched)
    parsed = parser.parse_args(argv, namespace=blank)
    return {dest for dest, value in vars(parsed).items() if value is not untouched}


def _read_config(parser: argparse.ArgumentParser, path: str) -> dict:
    """{dest: value} of a YAML file: flag names without dashes, dotted (`apo.beta_r: 1`) or nested."""
    content = _yaml(path)
    by_name = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    dests, nothing, switches = [], {}, {}
    for name, value in flatten(content).items():
        action = by_name.get(name)
        if action is None or name == "config":
            raise OptionError(f"--config {path}: unknown flag {name!r}{_did_you_mean(name, by_name)}")
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise OptionError(f"--config {path}: {name} is a switch: true or false")
            switches[action.dest] = action.const if value else not action.const
        elif value is None:
            if action.default is not None:
                raise OptionError(f"--config {path}: {name} needs a value; its default is {action.default}")
            nothing[action.dest] = None
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        dests.append(action.dest)
    try:
        parsed = vars(parser.parse_args(words))
    except OptionError as error:
        raise OptionError(f"--config {path}: {error}") from None
    return {dest: parsed[dest] for dest in dests} | nothing | switches


def _yaml(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise OptionError(f"--config {path}: {line}{error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"--config {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise OptionError(f"--config {path}: expected `flag: value` lines")
    return content


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _loss(args: argparse.Namespace, own: OwnFile) -> str:
    """The name of the objective. A file that holds one loss need not be named again."""
    loss = args.loss or (own.losses[0] if len(own.losses) == 1 else None if own.losses else "apo")
    if loss is None:
        raise OptionError(
            f"--loss_path {args.loss_path} holds several losses, {', '.join(own.losses)}: choose one by --loss"
        )
    known = [*owners.losses(), OPENRLHF]
    if loss not in known:
        raise OptionError(f"--loss {loss}: no such loss; there are {', '.join(sorted(known))} (or --loss_path)")
    if own != OwnFile() and loss not in own.losses and args.alpha_mode not in own.controllers:
        choices = [f"--loss {name}" for name in own.losses] + [f"--alpha_mode {name}" for name in own.controllers]
        given = f"--loss {loss}" + (f" --alpha_mode {args.alpha_mode}" if own.controllers else "")
        raise OptionError(f"--loss_path has no effect with {given}: drop it, or choose {' or '.join(choices)}")
    return loss


def _defaults(args: argparse.Namespace, given: set[str]) -> dict:
    """Defaults that differ from OpenRLHF's: by loss, by reward, and without CUDA."""
    openrlhf = args.loss == OPENRLHF
    defaults: dict = {"vllm.num_engines": 1, "rollout.n_samples_per_prompt": 8}
    defaults["algo.advantage.estimator"] = "group_norm"  # what keeps OpenRLHF from asking for a critic
    if not openrlhf:
        defaults |= {"algo.kl.init_coef": 0.0, "algo.kl.use_loss": args.loss in GROUP_LOSSES}
        defaults |= _of_the_loss(args.loss)
        presets = owners.losses()[args.loss].presets(getattr(args, "rollout.max_new_tokens"))
        if unknown := [flag for flag in presets if not hasattr(args, flag)]:
            raise OptionError(
                f"--loss {args.loss}: its presets name an unknown flag, {unknown[0]!r}: correct its name"
            )
        defaults |= presets
        defaults["train.dynamic_batch_enable"] = "train.micro_batch_size" not in given
        if "actor.eps_clip" in given:
            defaults.pop("actor.eps_clip_low_high", None)
        if getattr(args, "adrpo.enable"):
            defaults["algo.kl.init_coef"] = 0.0
        use_loss = getattr(args, "algo.kl.use_loss") if "algo.kl.use_loss" in given else defaults["algo.kl.use_loss"]
        if getattr(args, "adrpo.enable") or use_loss:
            defaults["algo.kl.estimator"] = "k3"  # k1's gradient does not pull towards the reference
    if getattr(args, "actor.optim") == "muon":
        defaults["actor.max_norm"] = 0.0  # DeepSpeed would clip Muon's update, of norm 10 to 1,000, to 1
    if getattr(args, "ds.lora.rank") > 0:
        defaults["apo.sync"] = "buckets"  # OpenRLHF's way sends an adapter's tensors as they are
    if getattr(args, "apo.load_rollouts"):
        defaults["algo.dynamic_filtering_enable"] = False  # nothing can be sampled anew
    if getattr(args, "eval.temperature") == 0:
        defaults["eval.n_samples_per_prompt"] = 1  # greedy answers are all one
    defaults["data.label_key"] = "label"
    gpus = getattr(args, "actor.num_gpus_per_node")
    if args.runtime == "embedded":
        gpus = 1  # of one process
        defaults |= {"ds.attn_implementation": "sdpa", "ds.param_dtype": "fp32", "actor.num_gpus_per_node": gpus}
    elif not cpu.has_flash_attn():
        defaults["ds.attn_implementation"] = "sdpa"
    if not cpu.has_cuda():
        gpus = gpus if "actor.num_gpus_per_node" in given else 1
        defaults |= {
            "actor.num_gpus_per_node": gpus,
            "ds.attn_implementation": "sdpa",
            "ds.param_dtype": "fp32",
            "vllm.enforce_eager": True,
            "train.max_tokens_per_gpu": CPU_TOKENS,
        }
    nodes = getattr(args, "actor.num_nodes")
    return defaults | {
        "ref.num_nodes": nodes,
        "ref.num_gpus_per_node": gpus,
        "reward.num_nodes": nodes,
        "reward.num_gpus_per_node": gpus,
    }


def _of_the_loss(loss: str) -> dict:
    """{OpenRLHF's flag: default} of the settings by which a loss takes it over."""
    defaults: dict = {}
    for each in owners.losses()[loss].settings:
        if each.flag is not None:
            before = defaults.get(each.flag, ())
            defaults[each.flag] = each.default if each.part is None else (*before, each.default)
    return defaults
