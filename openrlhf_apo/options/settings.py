"""From argv to settings: file, defaults of the loss and of the machine, OpenRLHF's checks, then ours."""

import argparse
from types import SimpleNamespace

import yaml

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES, LossError
from openrlhf_apo.objectives.group_loss import load_losses
from openrlhf_apo.options import flags
from openrlhf_apo.options.checks import (
    OptionError,
    check_early,
    check_model_folder,
    check_settings,
    refuse_flags_without_effect,
)
from openrlhf_apo.options.upstream import upstream_checks, upstream_parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise OptionError(message)


def resolve(argv: list[str], check_model: bool = True) -> SimpleNamespace:
    """Nested settings as OpenRLHF uses them, plus `given`: the flags set by the user or by the file.

    Raises OptionError for anything that cannot work or would have no effect. `check_model=False` does not look at the
    model, which may have yet to be made.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    given = _given(parser, argv)
    if args.config:
        from_file = _read_config(parser, args.config)
        given |= from_file.keys()
        parser.set_defaults(**from_file)
        args = parser.parse_args(argv)
    args.loss = _loss(args)
    for flag, value in _defaults(args, given).items():
        if flag not in given:
            setattr(args, flag, value)
    refuse_flags_without_effect(args, given)
    check_early(args)
    try:
        settings = upstream_checks(args)
    except AssertionError as error:
        raise OptionError(str(error)) from None
    settings.given = sorted(given)
    check_settings(settings)
    if check_model:
        check_model_folder(settings)
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = upstream_parser()
    parser.__class__ = _Parser  # OpenRLHF built it; only how it reports an error differs
    parser.prog = "python -m openrlhf_apo.cli.train_apo_ray"
    parser.allow_abbrev = False  # --apo.alpha_m would silently be --apo.alpha_max
    flags.add_flags(parser)
    return parser


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
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError) as error:
        raise OptionError(f"--config {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise OptionError(f"--config {path}: expected `flag: value` lines")
    by_name = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    words: list[str] = []
    dests = []
    for name, value in flatten(content).items():
        action = by_name.get(name)
        if action is None or name == "config":
            raise OptionError(f"--config {path}: unknown flag {name!r}")
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise OptionError(f"--config {path}: {name} is a switch: true or false")
            words += [f"--{name}"] if value else []
        elif value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        dests.append(action.dest)
    try:
        parsed = vars(parser.parse_args(words))
    except OptionError as error:
        raise OptionError(f"--config {path}: {error}") from None
    return {dest: parsed[dest] for dest in dests}


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _loss(args: argparse.Namespace) -> str:
    """The name of the objective, with one's own losses loaded. A file that holds one loss need not be named again."""
    own = []
    if args.loss_path:
        try:
            own = load_losses(args.loss_path)
        except LossError as error:
            raise OptionError(f"--loss_path {error}") from None
    loss = args.loss or (own[0] if len(own) == 1 else None if own else "apo")
    if loss is None:
        raise OptionError(f"--loss_path {args.loss_path} holds several losses, {', '.join(own)}: choose one by --loss")
    known = [*GROUP_LOSSES, *TOKEN_LOSSES, flags.OPENRLHF]
    if loss not in known:
        raise OptionError(f"--loss {loss}: no such loss; there are {', '.join(sorted(known))} (or --loss_path)")
    if own and loss not in own:
        raise OptionError(f"--loss_path has no effect with --loss {loss}: drop it, or choose {', '.join(own)}")
    return loss


def _defaults(args: argparse.Namespace, given: set[str]) -> dict:
    """Defaults that differ from OpenRLHF's: by loss, and without CUDA."""
    defaults: dict = {"vllm.num_engines": 0 if getattr(args, "apo.load_rollouts") else 1}
    defaults["rollout.n_samples_per_prompt"] = 8
    defaults |= flags.loss_defaults(args.loss, getattr(args, "rollout.max_new_tokens"))
    if args.loss != flags.OPENRLHF:
        defaults["algo.advantage.estimator"] = "group_norm"  # what keeps OpenRLHF from asking for a critic
    if "actor.eps_clip" in given:
        defaults.pop("actor.eps_clip_low_high", None)
    if args.loss in GROUP_LOSSES:
        defaults["algo.kl.use_loss"] = True
    if getattr(args, "adrpo.enable"):
        defaults |= {"algo.kl.init_coef": 0.0}
    in_loss = getattr(args, "adrpo.enable") or defaults.get("algo.kl.use_loss") or getattr(args, "algo.kl.use_loss")
    if args.loss != flags.OPENRLHF and in_loss:
        defaults["algo.kl.estimator"] = "k3"  # k1's gradient does not pull towards the reference
    if getattr(args, "apo.load_rollouts"):
        defaults["algo.dynamic_filtering_enable"] = False  # nothing can be sampled anew
    gpus = getattr(args, "actor.num_gpus_per_node")
    if not has_cuda():
        gpus = gpus if "actor.num_gpus_per_node" in given else 1
        defaults |= {
            "actor.num_gpus_per_node": gpus,
            "ds.attn_implementation": "sdpa",
            "ds.param_dtype": "fp32",
            "vllm.enforce_eager": True,
        }
    defaults |= {"ref.num_nodes": getattr(args, "actor.num_nodes"), "ref.num_gpus_per_node": gpus}
    return defaults


def start_up_warnings(args: SimpleNamespace) -> list[str]:
    """Settings that work, but not as one would think."""
    warnings = []
    if args.loss in GROUP_LOSSES and args.loss not in flags.WITHOUT_ALPHA:
        updates = args.rollout.batch_size * args.rollout.n_samples_per_prompt // args.train.batch_size
        updates *= args.train.max_epochs
        on_policy = args.apo.anchor == "rollout" or (args.apo.anchor == "lagged" and args.apo.anchor_interval == 1)
        if args.alpha_mode == "guarded" and updates == 1 and on_policy and args.apo.confidence != "token":
            warnings.append(
                "one optimizer step per rollout with an on-policy anchor: u = 0, so the confidence c_t is 0 and alpha "
                "stays at alpha_max for ever. Take several steps per rollout (a smaller --train.batch_size or "
                "--train.max_epochs), or --apo.anchor lagged, ema or reference, or --apo.confidence token"
            )
    if args.rollout.top_p < 1:
        warnings.append(
            "--rollout.top_p below 1: samples come from a truncated distribution that the policy's log-probs do not "
            "describe; rollout_mismatch will show it"
        )
    return warnings
