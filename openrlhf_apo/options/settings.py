"""From argv to settings: file, defaults of the loss and of the machine, OpenRLHF's checks, then ours."""

import argparse
import os
from types import SimpleNamespace

import yaml

from openrlhf_apo.alpha import build_alpha_controller
from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.objectives import AlphaDivergenceLoss, GroupTargetBuilder
from openrlhf_apo.options import flags
from openrlhf_apo.options.upstream import upstream_checks, upstream_parser


class OptionError(ValueError):
    """A setting cannot be used; the message is one line for the user and names the fix."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise OptionError(message)


def resolve(argv: list[str]) -> SimpleNamespace:
    """Nested settings as OpenRLHF uses them, plus `given`: the flags set by the user or by the file.

    Raises OptionError for anything that cannot work or would have no effect.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    given = _given(parser, argv)
    if args.config:
        from_file = _read_config(parser, args.config)
        given |= from_file.keys()
        parser.set_defaults(**from_file)
        args = parser.parse_args(argv)
    _refuse_flags_without_effect(args, given)
    for flag, value in _defaults(args, given).items():
        if flag not in given:
            setattr(args, flag, value)
    _check_early(args)
    try:
        settings = upstream_checks(args)
    except AssertionError as error:
        raise OptionError(str(error)) from None
    settings.given = sorted(given)
    _check(settings)
    return settings


def alpha_settings(args: SimpleNamespace) -> dict:
    """The arguments of the α controller that `--alpha_mode` asks for."""
    apo, mode = args.apo, args.alpha_mode
    if mode == "fixed":
        return {"alpha": apo.alpha}
    bounds = {"alpha_max": apo.alpha_max, "alpha_min": apo.alpha_min, "rho": apo.rho}
    if mode == "ess":
        return bounds | {"gamma": apo.gamma, "weights": apo.ess_weights, "scope": apo.ess_scope}
    return bounds | {
        "lam": apo.lam,
        "reward_scale": apo.reward_scale,
        "reward_scale_mode": apo.reward_scale_mode,
        "baseline_init": apo.baseline_init,
    }


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
    for name, value in _flatten(content).items():
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


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _refuse_flags_without_effect(args: argparse.Namespace, given: set[str]) -> None:
    grouped = args.loss in flags.GROUP_LOSSES
    for flag in sorted(given):
        name = "--reward" if flag == "reward.name" else f"--{flag}"
        if flag in flags.NEEDS:
            needed, values = flags.NEEDS[flag]
            if getattr(args, needed) not in values:
                raise OptionError(f"{name} has no effect with --{needed} {getattr(args, needed)}: drop it")
        if flag.startswith("apo.") and flag not in flags.EVERY_LOSS and not grouped:
            raise OptionError(f"{name} has no effect with --loss {args.loss}: drop it")
        if flag.startswith(flags.WITHOUT_EFFECT):
            raise OptionError(f"{name} has no effect here (no critic, reward model or asynchronous trainer): drop it")
        if grouped and flag.startswith(flags.REPLACED_BY_GROUP_LOSS):
            raise OptionError(f"{name} has no effect with --loss {args.loss}: drop it, or use --loss grpo")
        fixed = flags.TOKEN_LOSSES.get(args.loss, {})
        if flag in fixed and flag != "actor.eps_clip_low_high" and getattr(args, flag) != fixed[flag]:
            raise OptionError(f"--loss {args.loss} is {name} {fixed[flag]}: drop {name}")


def _defaults(args: argparse.Namespace, given: set[str]) -> dict:
    """Defaults that differ from OpenRLHF's: by loss, and without CUDA."""
    defaults: dict = {"vllm.num_engines": 0 if getattr(args, "apo.load_rollouts") else 1}
    defaults["rollout.n_samples_per_prompt"] = 8
    if args.loss in flags.GROUP_LOSSES:
        defaults |= {"algo.advantage.estimator": "group_norm", "algo.kl.init_coef": 0.0}
    else:
        defaults |= flags.TOKEN_LOSSES[args.loss]
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


def _check_early(args: argparse.Namespace) -> None:
    """What OpenRLHF's own checks would trip over without saying what is meant."""
    if not getattr(args, "actor.model_name_or_path"):
        raise OptionError("--actor.model_name_or_path is missing: a Hugging Face folder or hub name")
    if not getattr(args, "data.prompt_dataset") and not getattr(args, "apo.load_rollouts"):
        raise OptionError("--data.prompt_dataset is missing: a file, folder or hub name")
    if getattr(args, "apo.load_rollouts") and getattr(args, "apo.save_rollouts"):
        raise OptionError("--apo.save_rollouts has no effect with --apo.load_rollouts: drop it")
    if getattr(args, "reward.name") and getattr(args, "reward.remote_url"):
        raise OptionError("--reward and --reward.remote_url are both set: choose one")
    if not getattr(args, "reward.name") and not getattr(args, "reward.remote_url"):
        if not getattr(args, "apo.load_rollouts"):
            raise OptionError("no reward: give --reward math_verify, or --reward.remote_url with a .py file or a URL")
        setattr(args, "reward.name", "math_verify")
    if getattr(args, "reward.name"):
        setattr(args, "reward.remote_url", "math_verify")  # OpenRLHF: rewards come without a reward model
    for url in (getattr(args, "reward.remote_url") or "").split(","):
        if url.endswith(".py") and not os.path.isfile(url):
            raise OptionError(f"--reward.remote_url {url}: no such file")
    group_size = getattr(args, "rollout.n_samples_per_prompt")
    if group_size < 2:
        raise OptionError(f"--rollout.n_samples_per_prompt {group_size}: a group needs at least 2 samples")
    if not has_cuda():
        for flag in (
            "ds.packing_samples",
            "train.dynamic_batch_enable",
            "vllm.enable_sleep",
            "ds.enable_sleep",
            "ds.adam_offload",
            "ds.load_in_4bit",
            "ds.deepcompile",
            "ds.use_liger_kernel",
        ):
            if getattr(args, flag):
                raise OptionError(f"--{flag} needs a GPU: drop it")
        if "flash" in getattr(args, "ds.attn_implementation"):
            raise OptionError("--ds.attn_implementation flash_attention needs a GPU: use sdpa")
        if getattr(args, "ds.param_dtype") == "fp16":
            raise OptionError("--ds.param_dtype fp16 needs a GPU: use fp32 or bf16")
        if getattr(args, "vllm.tensor_parallel_size") > 1 or getattr(args, "ds.ring_attn_size") > 1:
            raise OptionError("--vllm.tensor_parallel_size and --ds.ring_attn_size above 1 need GPUs: drop them")


def _check(args: SimpleNamespace) -> None:
    group, rollout, step = args.rollout.n_samples_per_prompt, args.rollout.batch_size, args.train.batch_size
    if step % group:
        raise OptionError(
            f"--train.batch_size {step} (samples per optimizer step) is not made of whole groups of {group} "
            f"(--rollout.n_samples_per_prompt): use a multiple of {group}"
        )
    if rollout * group % step:
        raise OptionError(
            f"--rollout.batch_size {rollout} prompts x {group} samples are not made of whole optimizer steps of "
            f"--train.batch_size {step} samples"
        )
    positive = {
        "--train.micro_batch_size": args.train.micro_batch_size,
        "--train.max_epochs": args.train.max_epochs,
        "--train.num_episodes": args.train.num_episodes,
        "--rollout.temperature": args.rollout.temperature,
        "--apo.anchor_interval": args.apo.anchor_interval,
        "--apo.logprob_const": args.apo.logprob_const,
        "--apo.timeout": args.apo.timeout,
        "--reward.timeout": args.reward.timeout,
    }
    for flag, value in positive.items():
        if not value > 0:
            raise OptionError(f"{flag} {value}: must be above 0")
    if not 0 < args.apo.anchor_beta < 1:
        raise OptionError(f"--apo.anchor_beta {args.apo.anchor_beta}: must be between 0 and 1")
    if args.data.max_len <= (args.rollout.max_new_tokens or 0):
        raise OptionError(
            f"--data.max_len {args.data.max_len} leaves no room for a prompt beside "
            f"--rollout.max_new_tokens {args.rollout.max_new_tokens}"
        )
    if args.eval.dataset and args.apo.load_rollouts:
        raise OptionError("--eval.dataset needs an engine: drop it or --apo.load_rollouts")
    if args.loss in flags.GROUP_LOSSES:
        try:
            build_alpha_controller(args.alpha_mode, **alpha_settings(args))
            GroupTargetBuilder(args.apo.beta_r)
            AlphaDivergenceLoss(args.apo.tau_anc, tuple(args.apo.weight_clip) if args.apo.weight_clip else None)
        except ValueError as error:
            raise OptionError(f"--apo: {error}") from None
    else:
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        if step % (args.train.micro_batch_size * ranks):
            raise OptionError(
                f"--train.batch_size {step} is not a multiple of --train.micro_batch_size "
                f"{args.train.micro_batch_size} x {ranks} ranks"
            )
    if args.apo.load_rollouts:
        if not any(name.startswith("rollout_") for name in _listdir(args.apo.load_rollouts)):
            raise OptionError(f"--apo.load_rollouts {args.apo.load_rollouts}: no rollout_*.jsonl there")
    _check_model(args)


def _listdir(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def _check_model(args: SimpleNamespace) -> None:
    from transformers import AutoConfig

    model = args.actor.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise OptionError(f"--actor.model_name_or_path {model}: {str(error).splitlines()[0]}") from None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not has_cuda() and args.vllm.num_engines and (head_dim < 32 or head_dim % 16):
        raise OptionError(f"--actor.model_name_or_path {model}: vLLM on CPU has no attention for head_dim {head_dim}")


def start_up_warnings(args: SimpleNamespace) -> list[str]:
    """Settings that work, but not as one would think."""
    warnings = []
    if args.loss in flags.GROUP_LOSSES:
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
