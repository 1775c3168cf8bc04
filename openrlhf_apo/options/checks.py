"""What is refused before Ray starts, each in one line that names the fix."""

import argparse
import json
import os
from types import SimpleNamespace

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, OPENRLHF
from openrlhf_apo.options import owners

# OpenRLHF's flags, by prefix, that only its own step (--loss openrlhf) reads.
ONLY_OPENRLHF = (
    "actor.policy_loss_type",
    "actor.loss_agg_mode",
    "actor.aux_loss_coef",
    "algo.advantage.",
    "algo.kl.target",
    "algo.kl.horizon",
    "algo.kl.unbiased_gradient",
    "reward.clip_range",
    "rollout.micro_batch_size",
    "ref.",
    "train.colocate_actor_ref",
    "train.dynamic_batch_enable",
    "train.max_tokens_per_gpu",
    "rollout.max_tokens_per_gpu",
    "train.enable_ema",
    "train.ema_beta",
    "ds.enable_sleep",
    "ds.lora",
    "ds.load_in_4bit",
)
# Without a critic, a reward model or OpenRLHF's asynchronous trainer.
WITHOUT_EFFECT = (
    "critic.",
    "train.colocate_critic_reward",
    "reward.model_name_or_path",
    "reward.normalize_enable",
    "reward.num_",
    "reward.offload",
    "ds.value_head_prefix",
    "train.async",
    "train.partial_rollout_enable",
    "train.agent_func_path",
    "data.image_key",
    "data.max_images_per_prompt",
    "actor.freeze_visual_encoder",
    "rollout.vllm_generate_batch_size",
    "vllm.sync_with_ray",
)
# Ours, that OpenRLHF's own step does not read.
NOT_OPENRLHF = ("adrpo.", "guidance.", "algo.dynamic_filtering", "apo.max_generations")


def refuse_flags_without_effect(args: argparse.Namespace, given: set[str]) -> None:
    """`given`: the flags that the user or the file sets."""
    for flag in sorted(given):
        if reason := _without_effect(flag, args):
            name = "--reward" if flag == "reward.name" else f"--{flag}"
            raise OptionError(f"{name} has no effect {reason}")


def _without_effect(flag: str, args: argparse.Namespace) -> str | None:
    """Why the flag does nothing here, and what to do; None when it does something."""
    openrlhf = args.loss == OPENRLHF
    adrpo, kl = getattr(args, "adrpo.enable"), getattr(args, "algo.kl.init_coef")
    with_this_loss = f"with --loss {args.loss}: drop it"
    if flag.startswith(WITHOUT_EFFECT):
        return "here (no critic, reward model or asynchronous trainer): drop it"
    if flag.startswith(ONLY_OPENRLHF) and not openrlhf:
        return f"{with_this_loss}, or use --loss openrlhf"
    if openrlhf and flag.startswith(NOT_OPENRLHF):
        return with_this_loss
    if flag == "alpha_mode" and not owners.uses(args.loss, "alpha"):
        return with_this_loss
    if not (openrlhf and flag.startswith("actor.")):  # these flags of OpenRLHF's are its own there
        owned = "actor.eps_clip_low_high" if flag == "actor.eps_clip" else flag
        if reason := owners.refusal(owned, args):
            return reason
    filtering = getattr(args, "algo.dynamic_filtering_enable")
    if flag in ("apo.max_generations", "algo.dynamic_filtering_range") and not filtering:
        return f"with --algo.dynamic_filtering_enable {filtering}: drop it"
    if flag in ("algo.kl.init_coef", "algo.kl.use_loss") and adrpo:
        return "with --adrpo.enable: drop it; the coefficient is --adrpo.beta_0"
    if flag in ("algo.kl.estimator", "algo.kl.use_loss") and kl == 0 and not adrpo:
        return "without KL: drop it, or set --algo.kl.init_coef"
    if flag == "reward.overlong_penalty_factor" and getattr(args, "reward.overlong_buffer_len") is None:
        return "without --reward.overlong_buffer_len: drop it"
    return None


def check_early(args: argparse.Namespace) -> None:
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


def check_settings(args: SimpleNamespace) -> None:
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
        "--apo.max_generations": args.apo.max_generations,
        "--apo.timeout": args.apo.timeout,
        "--reward.timeout": args.reward.timeout,
    }
    for flag, value in positive.items():
        if not value > 0:
            raise OptionError(f"{flag} {value}: must be above 0")
    if args.data.max_len <= (args.rollout.max_new_tokens or 0):
        raise OptionError(
            f"--data.max_len {args.data.max_len} leaves no room for a prompt beside "
            f"--rollout.max_new_tokens {args.rollout.max_new_tokens}"
        )
    if args.eval.dataset and args.apo.load_rollouts:
        raise OptionError("--eval.dataset needs an engine: drop it or --apo.load_rollouts")
    if args.loss == OPENRLHF:
        if args.algo.advantage.estimator == "gae":
            raise OptionError("--algo.advantage.estimator gae needs a critic: use group_norm, rloo or another")
        ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
        if step % (args.train.micro_batch_size * ranks):
            raise OptionError(
                f"--train.batch_size {step} is not a multiple of --train.micro_batch_size "
                f"{args.train.micro_batch_size} x {ranks} ranks"
            )
    if owners.uses(args.loss, "max_length") and not args.rollout.max_new_tokens:
        raise OptionError(f"--loss {args.loss} needs --rollout.max_new_tokens, the length that it measures answers by")
    if args.reward.overlong_buffer_len is not None:
        if not args.rollout.max_new_tokens or not 0 < args.reward.overlong_buffer_len <= args.rollout.max_new_tokens:
            raise OptionError(
                f"--reward.overlong_buffer_len {args.reward.overlong_buffer_len:g} must be above 0 and at most "
                f"--rollout.max_new_tokens {args.rollout.max_new_tokens}"
            )
    if args.loss in GROUP_LOSSES and not args.algo.kl.use_loss and args.algo.kl.init_coef > 0:
        raise OptionError(f"--loss {args.loss} has KL in the loss only: leave --algo.kl.use_loss on")
    if args.guidance.enable and args.apo.load_rollouts:
        raise OptionError("--guidance.enable and --loss g2rpo_a guide generation: drop --apo.load_rollouts")
    if args.algo.dynamic_filtering_enable and args.apo.load_rollouts:
        raise OptionError("--algo.dynamic_filtering_enable needs an engine: drop it or --apo.load_rollouts")
    if args.apo.load_rollouts:
        if not any(name.startswith("rollout_") for name in _listdir(args.apo.load_rollouts)):
            raise OptionError(f"--apo.load_rollouts {args.apo.load_rollouts}: no rollout_*.jsonl there")


def _listdir(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def check_model(args: SimpleNamespace) -> None:
    """The model's configuration can be read, asks for no code that was not allowed, and fits the engine."""
    from transformers import AutoConfig
    from transformers.utils import cached_file

    model = args.actor.model_name_or_path
    try:
        path = cached_file(model, "config.json")
        with open(path, encoding="utf-8") as file:
            brings_code = "auto_map" in json.load(file)
        if brings_code and not args.actor.trust_remote_code:
            raise OptionError(
                f"--actor.model_name_or_path {model} brings its own code: read it, then give --actor.trust_remote_code"
            )
        config = AutoConfig.from_pretrained(model, trust_remote_code=args.actor.trust_remote_code)
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"--actor.model_name_or_path {model}: {str(error).splitlines()[0]}") from None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if args.runtime == "ray" and not has_cuda() and args.vllm.num_engines and (head_dim < 32 or head_dim % 16):
        raise OptionError(f"--actor.model_name_or_path {model}: vLLM on CPU has no attention for head_dim {head_dim}")
