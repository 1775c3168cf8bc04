"""From checked settings to the plan of a run."""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

from openrlhf_apo.alpha import CONTROLLERS
from openrlhf_apo.objectives import (
    OPENRLHF,
    TOKEN_LOSSES,
    AlphaDivergenceLoss,
    GroupTargetBuilder,
    RolloutCorrection,
)
from openrlhf_apo.options import owners
from openrlhf_apo.options.manifest import manifest
from openrlhf_apo.options.owners import build, owner_of
from openrlhf_apo.options.placement import placement
from openrlhf_apo.options.record import run_record
from openrlhf_apo.options.rewards import reward_parts
from openrlhf_apo.trainer.anchor import AnchorSettings
from openrlhf_apo.trainer.group_objective import GroupPlan, GroupSettings
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.health import Health
from openrlhf_apo.trainer.kl_controller import AdaptiveKl
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.length_penalty import LengthPenalty
from openrlhf_apo.trainer.plan import DataPlan, EvaluationPlan, OutputPlan, RewardPlan, RunPlan, Schedule
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.rollouts import GroupFilter
from openrlhf_apo.trainer.token_objective import TokenPlan


def run_plan(args: SimpleNamespace, argv: Sequence[str] = ()) -> RunPlan:
    """argv: what `args` came from. Raises OptionError, one line, for the first value that its owner refuses."""
    sampling = SamplingSettings(
        samples_per_prompt=args.rollout.n_samples_per_prompt,
        temperature=args.rollout.temperature,
        top_p=args.rollout.top_p,
        max_new_tokens=args.rollout.max_new_tokens,
        max_len=args.data.max_len,
        seed=args.train.seed,
    )
    group_filter = None
    if args.algo.dynamic_filtering_enable:
        given = "algo.dynamic_filtering_range" in args.given
        group_filter = GroupFilter(tuple(args.algo.dynamic_filtering_range) if given else None)
    return RunPlan(
        loss=args.loss,
        objective=objective(args),
        regularizer=Regularizer(
            kl=args.algo.kl.init_coef,
            kl_in_reward=not args.algo.kl.use_loss,
            adrpo=build(owners.ADRPO, args) if args.adrpo.enable else None,
            entropy=args.actor.entropy_coef,
            kl_estimator=args.algo.kl.estimator,
            controller=_kl_controller(args),
            unbiased_gradient=args.algo.kl.unbiased_gradient,
        ),
        length_penalty=LengthPenalty(
            args.rollout.max_new_tokens or 0,
            args.reward.overlong_buffer_len,
            args.reward.overlong_penalty_factor,
            args.reward.stop_properly_penalty_coef,
        ),
        sampling=sampling,
        schedule=Schedule(
            prompts_per_rollout=args.rollout.batch_size,
            group_size=args.rollout.n_samples_per_prompt,
            groups_per_step=args.train.batch_size // args.rollout.n_samples_per_prompt,
            epochs=args.train.max_epochs,
            episodes=args.train.num_episodes,
            seed=args.train.seed,
        ),
        data=DataPlan(
            prompts=None if args.apo.load_rollouts else args.data.prompt_dataset,
            probabilities=args.data.prompt_probs,
            split=args.data.prompt_split,
            evaluation=args.eval.dataset,
            evaluation_split=args.eval.split,
            label_key=args.data.label_key,
            label_optional="math_verify" not in (args.reward.name or ()) and "data.label_key" not in args.given,
        ),
        reward=RewardPlan(
            parts=() if args.apo.load_rollouts else reward_parts(args),
            max_failures=args.reward.max_failures,
            isolate=args.reward.isolate,
        ),
        evaluation=_evaluation(args, sampling),
        output=OutputPlan(
            directory=args.ckpt.output_dir,
            saves_adapter=args.ds.lora.rank > 0 and not args.ckpt.merge_lora,
            checkpoints=args.ckpt.path,
            resumable=not args.ckpt.disable_ds,
            max_checkpoints=args.ckpt.max_num,
            max_checkpoints_gb=args.ckpt.max_mem,
            save_every=args.ckpt.save_steps if args.ckpt.save_steps > 0 else None,
            best_key=args.ckpt.best_metric_key,
            track_every=args.logger.logging_steps,
            resume=args.ckpt.load_enable,
            allowed_changes=tuple(args.ckpt.allow_changed or ()),
        ),
        micro_batches=MicroBatchLimit(
            samples=None if args.train.dynamic_batch_enable else args.train.micro_batch_size,
            tokens=args.train.max_tokens_per_gpu,
            packed=args.ds.packing_samples,
        ),
        health=Health(args.apo.max_mismatch, args.apo.max_equal_rollouts),
        placement=placement(args),
        manifest=manifest(args),
        correction=_correction(args),
        ema=args.train.ema_beta if args.train.enable_ema and args.loss != OPENRLHF else None,
        guidance=build(owners.GUIDANCE, args) if args.guidance.enable else None,
        group_filter=group_filter,
        max_generations=args.apo.max_generations,
        generate_batch=args.rollout.vllm_generate_batch_size,
        save_rollouts=args.apo.save_rollouts,
        saved_rollouts=args.apo.load_rollouts,
        asynchronous=args.train.async_enable,
        old_log_probs=args.apo.old_log_probs,
        check_every_sync=args.apo.check_weights,
        timeout=args.apo.timeout,
        max_restarts=args.train.max_restarts,
        max_engine_restarts=args.rollout.max_engine_restarts,
        record=run_record(args, argv),
    )


def objective(args: SimpleNamespace) -> GroupPlan | TokenPlan | None:
    if args.loss == OPENRLHF:
        return None
    loss = owners.losses()[args.loss]
    implementation = build(owner_of(loss.implementation), args) if loss.settings else loss()
    if args.loss in TOKEN_LOSSES:
        return TokenPlan(implementation, loss.uses, args.rollout.max_new_tokens)
    controller = None
    if "alpha" in loss.uses:
        controller = build(owner_of(CONTROLLERS[args.alpha_mode]), args)
    return GroupPlan(
        args.loss,
        implementation,
        controller,
        target=build(owner_of(GroupTargetBuilder), args),
        divergence=build(owner_of(AlphaDivergenceLoss), args),
        settings=build(owner_of(GroupSettings), args),
        anchor=build(owner_of(AnchorSettings), args),
    )


def _kl_controller(args: SimpleNamespace) -> AdaptiveKl | None:
    kl = args.algo.kl
    return None if kl.target is None else AdaptiveKl(kl.init_coef, kl.target, kl.horizon)


def _correction(args: SimpleNamespace) -> RolloutCorrection | None:
    advantage = args.algo.advantage
    if args.loss == OPENRLHF or advantage.is_correction_level == "off":
        return None
    low, high = advantage.is_correction_threshold
    return RolloutCorrection(
        advantage.is_correction_level, advantage.is_correction_mode, advantage.is_correction_gating, low, high
    )


def _evaluation(args: SimpleNamespace, training: SamplingSettings) -> EvaluationPlan | None:
    if not args.eval.dataset:
        return None
    sampling = replace(training, samples_per_prompt=args.eval.n_samples_per_prompt, temperature=args.eval.temperature)
    return EvaluationPlan(sampling, args.eval.steps if args.eval.steps > 0 else None, args.eval.ends)


def start_up_warnings(args: SimpleNamespace, plan: RunPlan) -> list[str]:
    """Settings that work, but not as one would think."""
    warnings = []
    if (
        isinstance(plan.objective, GroupPlan)
        and plan.objective.controller is not None
        and args.alpha_mode == "guarded"
    ):
        schedule = plan.schedule
        updates = schedule.epochs * math.ceil(schedule.prompts_per_rollout / schedule.groups_per_step)
        on_policy = plan.objective.anchor.always_on_policy and plan.behavior == "policy"
        if updates == 1 and on_policy and plan.objective.controller.confidence != "token":
            warnings.append(
                "one optimizer step per rollout with an on-policy anchor: u = 0, so the confidence c_t is 0 and alpha "
                "stays at alpha_max for ever. Take several steps per rollout (a smaller --train.batch_size or "
                "--train.max_epochs), or --apo.anchor lagged, ema or reference, or --apo.confidence token"
            )
    if args.actor.optim == "muon" and args.actor.max_norm > 0:
        warnings.append(
            f"--actor.max_norm {args.actor.max_norm:g} with --actor.optim muon: DeepSpeed clips what Muon has made of "
            "the gradient, whose norm is 10 to 1,000 whatever the gradient's; 0 clips nothing"
        )
    fitting = args.train.max_tokens_per_gpu // args.data.max_len
    if "train.micro_batch_size" in args.given and args.train.micro_batch_size == 1 and fitting > 1:
        warnings.append(
            f"--train.micro_batch_size 1: each sample is a micro-batch, though {fitting} of --data.max_len "
            f"{args.data.max_len} tokens would fit. Without it, micro-batches have --train.max_tokens_per_gpu tokens, "
            "which is faster"
        )
    if args.train.async_enable and args.runtime == "embedded" and not args.apo.load_rollouts:
        warnings.append(
            "--train.async_enable in one process: a rollout is sampled before the one before it trains; samples are "
            "as old as on a cluster, and nothing is faster. --runtime ray does both at once"
        )
    if args.rollout.top_p < 1:
        warnings.append(
            "--rollout.top_p below 1: samples come from a truncated distribution that the policy's log-probs do not "
            "describe; rollout_mismatch will show it"
        )
    return warnings
