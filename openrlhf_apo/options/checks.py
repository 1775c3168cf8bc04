"""What is missing, and values that do not go together: refused before Ray starts, each in one line that names the fix.
What single flags are refused for is in effects.py, DeepSpeed's and Ray's limits in check_cluster.py."""

import argparse
import os
from types import SimpleNamespace

from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, OPENRLHF
from openrlhf_apo.options import owners
from openrlhf_apo.options.rewards import CHOICES, check_words
from openrlhf_apo.trainer.kl_controller import LARGEST_ERROR

# OpenRLHF's estimators whose advantages need no group.
SINGLE_SAMPLE_ESTIMATORS = ("reinforce", "flash_reinforce")
ROWS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")  # endings of files, which no name on a hub has


def check_inputs(args: argparse.Namespace) -> None:
    """A model, prompts or saved rollouts, and a reward are there."""
    if not getattr(args, "actor.model_name_or_path"):
        raise OptionError("--actor.model_name_or_path is missing: a Hugging Face folder or hub name")
    rollouts, url = getattr(args, "apo.load_rollouts"), getattr(args, "reward.remote_url")
    if rollouts:
        if not any(name.startswith("rollout_") and name.endswith(".jsonl") for name in _listdir(rollouts)):
            raise OptionError(f"--apo.load_rollouts {rollouts}: no rollout_*.jsonl there")
        return
    if not getattr(args, "data.prompt_dataset"):
        raise OptionError("--data.prompt_dataset is missing: a file, folder or hub name")
    words, agent = getattr(args, "reward.name"), getattr(args, "train.agent_func_path")
    if agent is not None:
        if not (agent.endswith(".py") and os.path.isfile(agent)):
            raise OptionError(f"--train.agent_func_path {agent}: no such Python file (.py)")
        return
    if words and url:
        raise OptionError("--reward and --reward.remote_url are both set: choose one")
    if not words and not url and not getattr(args, "reward.model_name_or_path"):
        raise OptionError(f"no reward: {CHOICES}, or --reward.model_name_or_path, or --train.agent_func_path")
    check_words("--reward", words or [])
    check_words("--reward.remote_url", [url] if url else [])


def check_data_files(args: SimpleNamespace) -> None:
    """The reader would say so, after the imports that it needs, and ask a hub for some of them."""
    for flag in ("data.prompt_dataset", "eval.dataset"):
        for name in (owners.value_of(args, flag) or "").split(","):
            if name.endswith(ROWS) and "://" not in name and not os.path.exists(name):
                raise OptionError(f"--{flag} {name}: no such file: correct the path")


def _listdir(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def check_before_openrlhf(args: argparse.Namespace) -> None:
    """What OpenRLHF's own checks would refuse, without naming the flags."""
    group_size, estimator = getattr(args, "rollout.n_samples_per_prompt"), getattr(args, "algo.advantage.estimator")
    openrlhf = args.loss == OPENRLHF
    if group_size < 2 and not (openrlhf and estimator in SINGLE_SAMPLE_ESTIMATORS):
        single = f", but for --algo.advantage.estimator {' and '.join(SINGLE_SAMPLE_ESTIMATORS)}" if openrlhf else ""
        raise OptionError(f"--rollout.n_samples_per_prompt {group_size}: a group needs at least 2 samples{single}")
    if getattr(args, "train.async_enable"):
        _check_async(args)
    low, high = getattr(args, "algo.dynamic_filtering_range")
    if not low < high:
        raise OptionError(f"--algo.dynamic_filtering_range {low:g} {high:g}: the second must be above the first")
    samples, batch = getattr(args, "rollout.batch_size") * group_size, getattr(args, "rollout.micro_batch_size")
    together = getattr(args, "ds.ring_attn_size") * getattr(args, "ds.tensor_parallel_size")
    ranks = getattr(args, "actor.num_nodes") * getattr(args, "actor.num_gpus_per_node") // together
    if samples // batch < ranks:
        raise OptionError(
            f"--rollout.batch_size: {samples} samples in batches of {batch} (--rollout.micro_batch_size) are not one "
            f"for each of {ranks} ranks"
        )


def _check_async(args: argparse.Namespace) -> None:
    """A rollout is sampled while the one before trains."""
    for flag in ("train.colocate_all", "vllm.enable_sleep"):
        if getattr(args, flag):
            raise OptionError(
                f"--{flag} cannot be used with --train.async_enable: drop one (the engine samples while the policy "
                "trains, and needs GPUs of its own)"
            )
    if getattr(args, "rollout.max_engine_restarts") > 0:
        raise OptionError(
            "--rollout.max_engine_restarts cannot be used with --train.async_enable: use --train.max_restarts (a new "
            "engine would sample with newer weights than the others have)"
        )
    if getattr(args, "apo.old_log_probs") == "engine" and owners.uses(args.loss, "entropy"):
        raise OptionError(
            f"--apo.old_log_probs engine cannot be used with --loss {args.loss}: drop it (the loss weighs answers by "
            "the entropy of the policy that sampled them, which the engine does not report)"
        )


def check_settings(args: SimpleNamespace) -> None:
    _check_batches(args)
    _check_lengths(args)
    _check_loss(args)
    _check_data(args)
    for flag in ("apo.max_generations", "apo.max_mismatch", "apo.max_equal_rollouts", "apo.timeout", "reward.timeout"):
        value = owners.value_of(args, flag)
        if value is not None and not value > 0:
            raise OptionError(f"--{flag} {value}: must be above 0")
    for flag in ("reward.max_failures", "train.max_restarts", "rollout.max_engine_restarts"):
        if owners.value_of(args, flag) < 0:
            raise OptionError(f"--{flag} {owners.value_of(args, flag)}: must not be negative")


def _check_batches(args: SimpleNamespace) -> None:
    group, rollout, step = args.rollout.n_samples_per_prompt, args.rollout.batch_size, args.train.batch_size
    generated = args.rollout.vllm_generate_batch_size
    if generated < rollout:
        raise OptionError(
            f"--rollout.vllm_generate_batch_size {generated} is below --rollout.batch_size {rollout}: every rollout "
            "would be short; raise it, or drop it"
        )
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


def _check_lengths(args: SimpleNamespace) -> None:
    new_tokens, buffer = args.rollout.max_new_tokens, args.reward.overlong_buffer_len
    if args.data.max_len <= (new_tokens or 0):
        raise OptionError(
            f"--data.max_len {args.data.max_len} leaves no room for a prompt beside "
            f"--rollout.max_new_tokens {new_tokens}"
        )
    if owners.uses(args.loss, "max_length") and not new_tokens:
        raise OptionError(f"--loss {args.loss} needs --rollout.max_new_tokens, the length that it measures answers by")
    if buffer is not None and (not new_tokens or not 0 < buffer <= new_tokens):
        raise OptionError(
            f"--reward.overlong_buffer_len {buffer:g} must be above 0 and at most --rollout.max_new_tokens "
            f"{new_tokens}"
        )


def _check_loss(args: SimpleNamespace) -> None:
    if args.loss in GROUP_LOSSES and not args.algo.kl.use_loss and args.algo.kl.init_coef > 0:
        raise OptionError(f"--loss {args.loss} has KL in the loss only: leave --algo.kl.use_loss on")
    samples, kl = args.rollout.batch_size * args.rollout.n_samples_per_prompt, args.algo.kl
    if args.loss != OPENRLHF and kl.target is not None and LARGEST_ERROR * samples >= kl.horizon:
        raise OptionError(
            f"--algo.kl.horizon {kl.horizon}: a rollout of {samples} samples could take all of the coefficient: give "
            f"more than {LARGEST_ERROR * samples:g}"
        )
    if owners.uses(args.loss, "alpha") and args.alpha_mode == "ess":
        gamma, group = args.apo.gamma, args.rollout.n_samples_per_prompt
        if gamma * group <= 1:
            raise OptionError(
                f"--apo.gamma {gamma:g} must be above 1/{group}, as the effective sample size of {group} answers is "
                "never below 1"
            )
    if args.loss == OPENRLHF:
        if args.algo.advantage.estimator == "gae":
            raise OptionError("--algo.advantage.estimator gae needs a critic: use group_norm, rloo or another")
    _check_is_correction(args.loss, args.algo.advantage)


def _check_is_correction(loss: str, advantage: SimpleNamespace) -> None:
    """What OpenRLHF's PolicyLoss would refuse in the policy's actors, and what no answer could pass."""
    if advantage.is_correction_level == "off":
        return
    flag, ratio = "--algo.advantage.is_correction", advantage.is_correction_gating == "ratio"
    if loss in GROUP_LOSSES and advantage.is_correction_level == "token":
        raise OptionError(
            f"{flag}_level token: --loss {loss} is a function of log-ratios of whole answers, in which a token has no "
            f"weight of its own: use {flag}_level seq, or a token loss"
        )
    low, high = advantage.is_correction_threshold
    if not 0 <= low < high:
        raise OptionError(f"{flag}_threshold {low:g} {high:g}: give HIGH above 0, or LOW below HIGH")
    if advantage.is_correction_mode == "clip" and not (advantage.is_correction_level == "token" and ratio):
        raise OptionError(
            f"{flag}_mode clip needs {flag}_level token and {flag}_gating ratio: nothing else is a weight"
        )
    if not ratio and advantage.is_correction_threshold[0] > 0:
        raise OptionError(
            f"{flag}_gating {advantage.is_correction_gating} is bounded from above only: give one "
            f"{flag}_threshold, and not {' '.join(f'{bound:g}' for bound in advantage.is_correction_threshold)}"
        )


def _check_data(args: SimpleNamespace) -> None:
    if args.apo.load_rollouts:
        for flag in ("eval.dataset", "guidance.enable", "algo.dynamic_filtering_enable"):
            if owners.value_of(args, flag):
                raise OptionError(f"--{flag} needs an engine: drop it or --apo.load_rollouts")
    probabilities = (args.data.prompt_probs or "").split(",")
    sets = (args.data.prompt_dataset or "").split(",")
    if args.data.prompt_probs and len(probabilities) != len(sets):
        raise OptionError(
            f"--data.prompt_probs {args.data.prompt_probs} are {len(probabilities)} for {len(sets)} data sets of "
            "--data.prompt_dataset: give as many"
        )
    key, k = args.ckpt.best_metric_key, args.eval.n_samples_per_prompt
    if args.eval.temperature == 0 and k > 1:
        raise OptionError(f"--eval.n_samples_per_prompt {k}: at --eval.temperature 0 all answers are one: drop either")
    known = ["pass1", "score_mean"] + [f"pass{k}", f"score_best{k}", "distinct_right"] * (k > 1)
    if key not in ("", "none") and not (key.startswith("eval/") and key.rpartition("/")[2] in known):
        raise OptionError(
            f"--ckpt.best_metric_key {key}: use eval/pass1 (of graded rewards eval/score_mean), another eval/... of "
            f"metrics.jsonl (its last part is one of {', '.join(known)}), or none"
        )
