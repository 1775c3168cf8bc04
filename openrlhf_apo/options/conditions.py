"""When a flag that works has no effect all the same, for want of another flag or beside one: given then, it is
refused. OpenRLHF's flags and this project's; those of losses and controllers are in owners.py."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.objectives import GROUP_LOSSES, OPENRLHF, TOKEN_LOSSES
from openrlhf_apo.options import owners
from openrlhf_apo.options.openrlhf_flags import SCHEDULERS_WITH_MIN_LR

# Flags that switch a tracker on.
TRACKERS = ("logger.wandb.key", "logger.tensorboard_dir", "logger.swanlab_project", "logger.trackio_project")


class Values:
    """values["eval.dataset"], and `given`: the flags that the user or the file sets."""

    def __init__(self, args: argparse.Namespace, given: set[str]):
        self.args, self.given = args, given

    def __getitem__(self, flag: str):
        return getattr(self.args, flag)


@dataclass(frozen=True)
class Condition:
    """flags: have no effect `when` this holds. The error is "--FLAG has no effect BECAUSE: FIX"."""

    flags: str  # separated by spaces; one that ends with * stands for all that begin so
    because: str
    when: Callable[[Values], bool]
    fix: str = "drop it"

    def names(self, flag: str) -> bool:
        return any(
            flag == name or (name.endswith("*") and flag.startswith(name[:-1])) for name in self.flags.split(" ")
        )


def never_evaluated(v: Values) -> bool:
    return not v["eval.dataset"] or (v["eval.steps"] == -1 and not v["eval.ends"])


def _no_kl(v: Values) -> bool:
    return v["algo.kl.init_coef"] == 0 and not v["adrpo.enable"]


def _ratio_of_answers(v: Values) -> bool:
    return v["loss"] in TOKEN_LOSSES and TOKEN_LOSSES[v["loss"]].implementation.ratio_of_answers


def _has_surplus(v: Values) -> bool:
    """Whether a rollout may train on groups that an earlier policy sampled."""
    return v["rollout.vllm_generate_batch_size"] is not None or v["algo.dynamic_filtering_enable"]


def _engine_is_old(v: Values) -> bool:
    """Whether log-probs of the policy that sampled are those that the engine reported (trainer/plan.py, behavior)."""
    return v["train.async_enable"] and (v["apo.old_log_probs"] == "engine" or _anchor_is_another(v))


def _anchor_is_another(v: Values) -> bool:
    return v["loss"] in GROUP_LOSSES and v["apo.anchor"] != "rollout"


def _rewards(v: Values) -> int:
    """How many rewards are added up."""
    return len(v["reward.name"] or []) + bool(v["reward.remote_url"]) + bool(v["reward.model_name_or_path"])


def _no_tracker(v: Values) -> bool:
    return not any(v[flag] for flag in TRACKERS)


def _length_unused(v: Values) -> bool:
    return not owners.uses(v["loss"], "max_length") and v["reward.overlong_buffer_len"] is None


CONDITIONS = [
    # This project's run.
    Condition(
        "adrpo.* guidance.* apo.max_generations",
        "with --loss openrlhf, which goes by OpenRLHF's flags alone",
        lambda v: v["loss"] == OPENRLHF,
    ),
    Condition("apo.save_rollouts", "with --apo.load_rollouts", lambda v: bool(v["apo.load_rollouts"])),
    Condition(
        "vllm.* rollout.top_p data.prompt_dataset data.prompt_probs data.prompt_split data.input_key data.label_key "
        "data.input_template data.apply_chat_template data.max_samples data.max_len train.num_episodes reward.name "
        "reward.remote_url reward.weights reward.timeout reward.max_failures reward.isolate apo.check_weights "
        "reward.model_name_or_path reward.normalize_enable reward.num_* reward.offload ds.value_head_prefix "
        "apo.sync rollout.max_engine_restarts rollout.vllm_generate_batch_size apo.max_mismatch train.agent_func_path",
        "with --apo.load_rollouts, which neither samples nor scores",
        lambda v: bool(v["apo.load_rollouts"]),
    ),
    Condition(
        "reward.name reward.remote_url reward.weights reward.isolate reward.model_name_or_path reward.num_* "
        "reward.normalize_enable reward.offload ds.value_head_prefix",
        "with --train.agent_func_path, whose agent gives the rewards",
        lambda v: bool(v["train.agent_func_path"]),
    ),
    Condition(
        "guidance.*",
        "with --train.agent_func_path, as it gives an answer its beginning, and an agent makes the whole conversation",
        lambda v: bool(v["train.agent_func_path"]),
    ),
    Condition(
        "rollout.max_new_tokens",
        "with --apo.load_rollouts, where neither the loss nor a length penalty asks for it",
        lambda v: bool(v["apo.load_rollouts"]) and _length_unused(v),
    ),
    Condition(
        "rollout.max_engine_restarts",
        "where weights do not go to the engines in buckets, as the policy cannot join a new engine then",
        lambda v: has_cuda() if v["apo.sync"] is None else v["apo.sync"] != "buckets",
        "give --apo.sync buckets, or --train.max_restarts instead",
    ),
    Condition(
        "reward.isolate",
        "where the reward is no .py file (math_verify always has processes of its own)",
        lambda v: not any(word.endswith(".py") for word in [*(v["reward.name"] or []), v["reward.remote_url"] or ""]),
    ),
    Condition(
        "reward.timeout",
        "where only a model scores",
        lambda v: bool(v["reward.model_name_or_path"]) and not v["reward.name"] and not v["reward.remote_url"],
    ),
    Condition(
        "reward.max_failures",
        "with --reward math_verify, for which an answer that cannot be verified is wrong",
        lambda v: v["reward.name"] == ["math_verify"] and not v["reward.model_name_or_path"],
    ),
    Condition("reward.weights", "with one reward", lambda v: _rewards(v) < 2),
    Condition(
        "reward.normalize_enable reward.num_* reward.offload ds.value_head_prefix",
        "without --reward.model_name_or_path",
        lambda v: not v["reward.model_name_or_path"],
    ),
    Condition(
        "train.async_enable",
        "with --train.agent_func_path, whose turns are taken by the process that trains",
        lambda v: bool(v["train.agent_func_path"]),
    ),
    Condition(
        "apo.old_log_probs",
        "without --train.async_enable",
        lambda v: not v["train.async_enable"],
        "give it, or drop this one",
    ),
    Condition(
        "apo.old_log_probs",
        "with --apo.anchor lagged, ema and reference, whose weights are the only ones kept beside the policy's",
        _anchor_is_another,
    ),
    Condition(
        "apo.max_mismatch algo.advantage.is_correction_*",
        "with --train.async_enable where the engine's own log-probs stand for the policy that sampled, as there is "
        "nothing to compare them with (--apo.old_log_probs engine, or another --apo.anchor than rollout)",
        _engine_is_old,
    ),
    # Evaluation, checkpoints, trackers.
    Condition(
        "eval.split eval.temperature eval.n_samples_per_prompt eval.ends",
        "without --eval.dataset",
        lambda v: not v["eval.dataset"],
    ),
    Condition(  # -1, never, is what OpenRLHF's scripts say
        "eval.steps", "without --eval.dataset", lambda v: not v["eval.dataset"] and v["eval.steps"] != -1
    ),
    Condition(
        "eval.dataset eval.split eval.temperature eval.n_samples_per_prompt",
        "without --eval.steps or --eval.ends",
        never_evaluated,
        "give one of them, or drop it",
    ),
    Condition(
        "ckpt.best_metric_key", "without an evaluation", never_evaluated, "give --eval.dataset and --eval.steps"
    ),
    Condition(
        "ckpt.disable_ds",
        "without --ckpt.save_hf, as no checkpoint of any kind is left then",
        lambda v: not v["ckpt.save_hf"],
        "add --ckpt.save_hf, or drop it",
    ),
    Condition(
        "ckpt.max_num ckpt.max_mem",
        "without --ckpt.save_steps",
        lambda v: v["ckpt.save_steps"] == -1,
        "give it, or drop this one",
    ),
    Condition("ckpt.max_num ckpt.max_mem", "with --ckpt.disable_ds", lambda v: v["ckpt.disable_ds"]),
    Condition(
        "ds.use_universal_ckpt ckpt.allow_changed", "without --ckpt.load_enable", lambda v: not v["ckpt.load_enable"]
    ),
    Condition(
        "logger.wandb.org logger.wandb.group logger.wandb.project",
        "without --logger.wandb.key",
        lambda v: not v["logger.wandb.key"],
    ),
    Condition(
        "logger.wandb.run_name logger.logging_steps",
        f"without a tracker ({', '.join(f'--{flag}' for flag in TRACKERS)})",
        _no_tracker,
    ),
    # Optimizer and model.
    Condition(
        "actor.muon.*",
        "with --actor.optim adam",
        lambda v: v["actor.optim"] == "adam",
        "drop it, or use --actor.optim muon",
    ),
    Condition(
        "actor.min_lr_ratio",
        f"with other --actor.lr_scheduler than {' and '.join(SCHEDULERS_WITH_MIN_LR)}",
        lambda v: v["actor.lr_scheduler"] not in SCHEDULERS_WITH_MIN_LR,
    ),
    Condition(
        "actor.lr_warmup_ratio",
        "with --actor.lr_scheduler constant",
        lambda v: v["actor.lr_scheduler"] == "constant",
        "drop it, or use constant_with_warmup",
    ),
    Condition(
        "actor.gradient_checkpointing_reentrant",
        "without --actor.gradient_checkpointing_enable",
        lambda v: not v["actor.gradient_checkpointing_enable"],
    ),
    Condition(
        "ds.lora.alpha ds.lora.dropout ds.lora.target_modules ds.load_in_4bit ckpt.merge_lora",
        "without --ds.lora.rank",
        lambda v: v["ds.lora.rank"] == 0,
        "give it, or drop this one",
    ),
    Condition("ds.zpg ref.offload reward.offload", "below --ds.zero_stage 3", lambda v: v["ds.zero_stage"] < 3),
    Condition(
        "ds.enable_sleep", "with --ds.adam_offload, which keeps the states off the GPU", lambda v: v["ds.adam_offload"]
    ),
    Condition(
        "ds.enable_sleep",
        "with --apo.load_rollouts, beside which no engine runs",
        lambda v: bool(v["apo.load_rollouts"]),
    ),
    Condition(
        "ref.offload",
        "with --ds.lora.rank, where the reference is the policy's own base",
        lambda v: v["ds.lora.rank"] > 0 and v["loss"] != OPENRLHF,
    ),
    Condition("ds.overlap_comm", "with --ds.zero_stage 0", lambda v: v["ds.zero_stage"] == 0),
    Condition("ds.ring_attn_head_stride", "with --ds.ring_attn_size 1", lambda v: v["ds.ring_attn_size"] == 1),
    Condition(
        "vllm.sync_with_ray",
        "with --train.colocate_all, where weights travel by CUDA IPC",
        lambda v: v["train.colocate_all"],
    ),
    Condition(
        "vllm.sync_backend vllm.sync_with_ray",
        "with --apo.sync buckets, which are this project's",
        lambda v: v["apo.sync"] == "buckets",
    ),
    # Data.
    Condition("data.input_template", "with --data.apply_chat_template", lambda v: v["data.apply_chat_template"]),
    Condition(
        "data.prompt_probs",
        "with one --data.prompt_dataset",
        lambda v: "," not in (v["data.prompt_dataset"] or ""),
    ),
    Condition(
        "apo.max_generations algo.dynamic_filtering_range",
        "with --algo.dynamic_filtering_enable False",
        lambda v: not v["algo.dynamic_filtering_enable"],
    ),
    Condition(
        "reward.overlong_penalty_factor",
        "without --reward.overlong_buffer_len",
        lambda v: v["reward.overlong_buffer_len"] is None,
    ),
    # KL, clip, and OpenRLHF's own step.
    Condition(
        "algo.kl.init_coef algo.kl.use_loss algo.kl.target algo.kl.horizon",
        "with --adrpo.enable",
        lambda v: v["adrpo.enable"],
        "drop it; the coefficient is --adrpo.beta_0",
    ),
    Condition(
        "algo.kl.estimator algo.kl.use_loss algo.kl.target algo.kl.unbiased_gradient ref.num_* "
        "train.colocate_actor_ref",
        "without KL",
        _no_kl,
        "drop it, or set --algo.kl.init_coef",
    ),
    Condition(
        "ref.offload",
        "without a reference",
        lambda v: _no_kl(v) and v["apo.anchor"] != "reference",
        "drop it, or set --algo.kl.init_coef",
    ),
    Condition("algo.kl.horizon", "without --algo.kl.target", lambda v: v["algo.kl.target"] is None),
    Condition(
        "algo.kl.unbiased_gradient",
        "without --algo.kl.use_loss",
        lambda v: not v["algo.kl.use_loss"] and not v["adrpo.enable"],
    ),
    Condition("train.colocate_actor_ref", "with --train.colocate_all", lambda v: v["train.colocate_all"]),
    Condition("actor.eps_clip", "with --actor.eps_clip_low_high", lambda v: "actor.eps_clip_low_high" in v.given),
    Condition(
        "actor.loss_agg_mode",
        "with --actor.policy_loss_type gspo, which is a mean over answers",
        lambda v: v["actor.policy_loss_type"] == "gspo",
    ),
    Condition(
        "algo.advantage.is_correction_mode algo.advantage.is_correction_gating algo.advantage.is_correction_threshold",
        "without --algo.advantage.is_correction_level",
        lambda v: v["algo.advantage.is_correction_level"] == "off",
    ),
    Condition(
        "algo.advantage.is_correction_mode algo.advantage.is_correction_gating algo.advantage.is_correction_threshold",
        "with gspo, where the correction is the engine's log-probs in the place of the old policy's",
        lambda v: v["actor.policy_loss_type"] == "gspo" or _ratio_of_answers(v),
    ),
    Condition(
        "algo.advantage.is_correction_*",
        "with --runtime embedded, whose engine samples from the very weights that are trained",
        lambda v: v["runtime"] == "embedded" and not v["apo.load_rollouts"] and not _has_surplus(v),
        "drop it, or use --runtime ray",
    ),
    Condition(
        "algo.advantage.gamma",
        "with other --algo.advantage.estimator than reinforce",
        lambda v: v["algo.advantage.estimator"] != "reinforce",
    ),
    Condition(
        "algo.advantage.no_std_norm",
        "with other --algo.advantage.estimator than reinforce and reinforce_baseline",
        lambda v: v["algo.advantage.estimator"] not in ("reinforce", "reinforce_baseline"),
    ),
    Condition("train.ema_beta", "without --train.enable_ema", lambda v: not v["train.enable_ema"]),
    Condition(
        "rollout.max_tokens_per_gpu train.max_tokens_per_gpu",
        "without --train.dynamic_batch_enable",
        lambda v: v["loss"] == OPENRLHF and not v["train.dynamic_batch_enable"],
    ),
    Condition(
        "train.max_tokens_per_gpu train.dynamic_batch_enable",
        "beside --train.micro_batch_size",
        lambda v: v["loss"] != OPENRLHF and "train.micro_batch_size" in v.given,
        "drop one of the two",
    ),
    Condition(
        "rollout.micro_batch_size train.micro_batch_size",
        "with --train.dynamic_batch_enable",
        lambda v: v["loss"] == OPENRLHF and v["train.dynamic_batch_enable"],
    ),
]
