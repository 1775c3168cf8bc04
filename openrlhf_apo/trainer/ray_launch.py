"""Starts a run on Ray: cluster, policy, reference, engines, and the trainer in this process."""

import logging
import math
import os

from openrlhf_apo import cpu

cpu.install()

import ray  # noqa: E402
from openrlhf.trainer.ray.launcher import RayActorGroup  # noqa: E402
from openrlhf.utils.logging_utils import TensorboardLogger, WandbLogger  # noqa: E402
from openrlhf.utils.utils import get_tokenizer  # noqa: E402
from ray.util.placement_group import PlacementGroup, placement_group  # noqa: E402

from openrlhf_apo.objectives import GROUP_LOSSES, GroupTargetBuilder  # noqa: E402
from openrlhf_apo.options import objects  # noqa: E402
from openrlhf_apo.options.flags import OPENRLHF  # noqa: E402
from openrlhf_apo.trainer.group_objective import Anchor, GroupObjective  # noqa: E402
from openrlhf_apo.trainer.handles import SamplingSettings  # noqa: E402
from openrlhf_apo.trainer.length_penalty import LengthPenalty  # noqa: E402
from openrlhf_apo.trainer.loop import (  # noqa: E402
    EngineRollouts,
    Evaluation,
    FileRollouts,
    GroupFilter,
    Trainer,
    evaluation_prompts,
    evaluation_settings,
)
from openrlhf_apo.trainer.metrics import MetricsFile  # noqa: E402
from openrlhf_apo.trainer.openrlhf_update import OpenRLHFUpdate  # noqa: E402
from openrlhf_apo.trainer.prompts import DataError, PromptStream, load_prompts  # noqa: E402
from openrlhf_apo.trainer.ray_calls import RunError, get_all  # noqa: E402
from openrlhf_apo.trainer.ray_engine import RayEngine, create_engines  # noqa: E402
from openrlhf_apo.trainer.ray_policy import PolicyActor, RayPolicy, ReferenceActor  # noqa: E402
from openrlhf_apo.trainer.regularizer import Regularizer  # noqa: E402
from openrlhf_apo.trainer.rollout_files import RolloutFiles  # noqa: E402
from openrlhf_apo.trainer.scoring import MathVerifyReward, Scorer, UpstreamReward  # noqa: E402
from openrlhf_apo.trainer.strategy import ApoStrategy  # noqa: E402
from openrlhf_apo.trainer.token_objective import TokenObjective  # noqa: E402
from openrlhf_apo.trainer.update import Update  # noqa: E402

logger = logging.getLogger(__name__)


def train(args) -> None:
    """Run `args`, resolved by openrlhf_apo.options, to its end. Bad data is refused before Ray starts."""
    strategy = ApoStrategy(args, unmanaged_accumulation=args.loss != OPENRLHF)
    tokenizer = get_tokenizer(
        args.actor.model_name_or_path, None, "left", strategy, use_fast=not args.data.disable_fast_tokenizer
    )
    settings = SamplingSettings(
        samples_per_prompt=args.rollout.n_samples_per_prompt,
        temperature=args.rollout.temperature,
        top_p=args.rollout.top_p,
        max_new_tokens=args.rollout.max_new_tokens,
        max_len=args.data.max_len,
        seed=args.train.seed,
    )
    scorer = Scorer(_reward(args), args.reward.max_failures)
    evaluation = _evaluation(args, strategy, tokenizer, settings)
    if args.apo.load_rollouts:
        prompts, files = None, RolloutFiles(args.apo.load_rollouts)
        num_rollouts = len(files)
    else:
        prompts = _prompt_stream(args, strategy, tokenizer)
        files = RolloutFiles(args.apo.save_rollouts) if args.apo.save_rollouts else None
        num_rollouts = len(prompts) // args.rollout.batch_size
    samples_per_rollout = args.rollout.batch_size * args.rollout.n_samples_per_prompt
    optimizer_steps = num_rollouts * samples_per_rollout // args.train.batch_size * args.train.max_epochs

    start_ray(args)
    policy_group, reference_group, engines = _start_actors(args, strategy, optimizer_steps)
    policy = RayPolicy(policy_group, args.train.micro_batch_size, args.apo.timeout)
    engine = RayEngine(engines, policy, tokenizer, args) if engines else None
    guidance = objects.guidance(args)
    if engine:
        kept = _group_filter(args) if args.algo.dynamic_filtering_enable else None
        rollouts = EngineRollouts(
            prompts, args.rollout.batch_size, settings, engine, scorer, files, kept, args.apo.max_generations, guidance
        )
    else:
        rollouts = FileRollouts(files)
    objective = _objective(args, policy, len(tokenizer)) if args.loss != OPENRLHF else None
    if objective is None:
        update = OpenRLHFUpdate(policy_group, reference_group, strategy, tokenizer)
    else:
        update = Update(
            policy,
            objective,
            groups_per_step=args.train.batch_size // args.rollout.n_samples_per_prompt,
            epochs=args.train.max_epochs,
            regularizer=Regularizer(
                kl=args.algo.kl.init_coef,
                kl_in_reward=not args.algo.kl.use_loss,
                adrpo=objects.adrpo(args),
                entropy=args.actor.entropy_coef,
            ),
            length_penalty=LengthPenalty(
                args.rollout.max_new_tokens or 0,
                args.reward.overlong_buffer_len,
                args.reward.overlong_penalty_factor,
                args.reward.stop_properly_penalty_coef,
            ),
        )

    parts = {"scorer": scorer, "prompts": prompts, "objective": objective, "guidance": guidance}
    state = {name: part for name, part in parts.items() if part is not None}
    start_step = _resume(args, policy, state)
    trackers = [WandbLogger(args)] if args.logger.wandb.key else []
    trackers += [TensorboardLogger(args)] if args.logger.tensorboard_dir else []
    Trainer(
        policy=policy,
        engine=engine,
        rollouts=rollouts,
        update=update.run,
        group_size=args.rollout.n_samples_per_prompt,
        scorer=scorer,
        evaluation=evaluation,
        metrics=MetricsFile(os.path.join(args.ckpt.output_dir, "metrics.jsonl"), start_step or None),
        trackers=trackers,
        track_every=args.logger.logging_steps,
        save_every=math.inf if args.ckpt.save_steps < 0 else args.ckpt.save_steps,
        state=state,
        start_step=start_step,
    ).fit()
    for tracker in trackers:
        tracker.close()


def _prompt_stream(args, strategy, tokenizer) -> PromptStream:
    solution_key = args.g2rpo_a.solution_key if args.loss == "g2rpo_a" else None
    rows = load_prompts(
        strategy, tokenizer, args.data.prompt_dataset, args.data.prompt_probs, args.data.prompt_split, solution_key
    )
    prompts = PromptStream(rows, args.train.seed, args.train.num_episodes)
    if len(prompts) < args.rollout.batch_size:
        raise DataError(
            f"{len(rows)} prompts x {args.train.num_episodes} episodes are fewer than one --rollout.batch_size "
            f"({args.rollout.batch_size})"
        )
    if left_over := len(prompts) % args.rollout.batch_size:
        logger.info("the last %d of %d prompt draws do not fill a rollout and are left out", left_over, len(prompts))
    return prompts


def _evaluation(args, strategy, tokenizer, training: SamplingSettings) -> Evaluation | None:
    if not args.eval.dataset:
        return None
    rows = load_prompts(strategy, tokenizer, args.eval.dataset, None, args.eval.split)
    settings = evaluation_settings(training, args.eval.n_samples_per_prompt, args.eval.temperature)
    return Evaluation(evaluation_prompts(rows), settings, math.inf if args.eval.steps < 0 else args.eval.steps)


def _objective(args, policy: RayPolicy, vocab_size: int) -> GroupObjective | TokenObjective:
    if args.loss not in GROUP_LOSSES:
        return TokenObjective(policy, objects.token_loss(args), args.rollout.max_new_tokens)
    apo = args.apo
    return GroupObjective(
        policy,
        Anchor(policy, apo.anchor, apo.anchor_interval, apo.anchor_beta),
        args.loss,
        objects.alpha_controller(args),
        GroupTargetBuilder(apo.beta_r),
        tau_anc=apo.tau_anc,
        weight_clip=objects.weight_clip(args),
        reduction=apo.logprob_reduction,
        reduction_const=apo.logprob_const,
        confidence=apo.confidence,
        vocab_size=vocab_size,
        drop_zero_variance=apo.drop_zero_variance,
    )


def _group_filter(args) -> GroupFilter:
    given = "algo.dynamic_filtering_range" in args.given
    return GroupFilter(tuple(args.algo.dynamic_filtering_range) if given else None)


def _resume(args, policy: RayPolicy, state: dict) -> int:
    """Load the parts' states from the policy's checkpoint; the number of rollout steps that are already done."""
    if not args.ckpt.load_enable:
        return 0
    loaded = policy.trainer_state()
    if not loaded:
        logger.warning("no checkpoint in %s to resume from: starting anew", args.ckpt.path)
        return 0
    for name, part in state.items():
        part.load_state_dict(loaded[name])
    logger.info("resuming after step %d", loaded["step"])
    return loaded["step"]


def start_ray(args) -> None:
    """Join the cluster of RAY_ADDRESS, or start one here with as many logical GPUs as the run asks for."""
    needed = gpus_needed(args)
    environment = {
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
        "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN"),
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": os.environ.get("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1"),
    }
    local = {}
    if not cpu.has_cuda():
        threads = max(1, (os.cpu_count() or 1) // (args.actor.num_nodes * args.actor.num_gpus_per_node))
        environment |= {name: os.environ.get(name, value) for name, value in cpu.CPU_ENVIRONMENT.items()}
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        if not os.environ.get("RAY_ADDRESS"):
            # OpenRLHF asks Ray for GPUs; here they are only a count that places one actor each.
            local = {
                "address": "local",
                "num_gpus": needed,
                "num_cpus": max(needed + 1, os.cpu_count() or 1),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",  # Ray's ports are for this machine alone
            }
    ray.init(
        runtime_env={"env_vars": environment}, log_to_driver=args.logger.actor_logs, logging_level="warning", **local
    )
    have = int(ray.cluster_resources().get("GPU", 0))
    if have < needed:
        raise RunError(
            f"the run needs {needed} GPUs, the Ray cluster has {have}: lower --actor.num_gpus_per_node, "
            "--vllm.num_engines or --ref.num_gpus_per_node, or share GPUs with --train.colocate_all"
        )


def gpus_needed(args) -> int:
    actors = args.actor.num_nodes * args.actor.num_gpus_per_node
    if args.train.colocate_all:
        return actors
    engines = 0 if args.apo.load_rollouts else args.vllm.num_engines * args.vllm.tensor_parallel_size
    reference = 0
    if _wants_reference(args) and not args.train.colocate_actor_ref:
        reference = args.ref.num_nodes * args.ref.num_gpus_per_node
    return actors + engines + reference


def _wants_reference(args) -> bool:
    return args.loss == OPENRLHF and args.algo.kl.init_coef > 0


def _start_actors(args, strategy, max_steps: int):
    """Policy group, reference group or None, and engine actors; all started at once, and waited for together."""
    logger.info("starting the policy (DeepSpeed) and the engine (vLLM)")
    num_actors = args.actor.num_nodes * args.actor.num_gpus_per_node
    duplicates = args.ds.ring_attn_size * args.ds.tensor_parallel_size
    shares = args.train.colocate_all or args.train.colocate_actor_ref
    policy_pg = _bundles(args, num_actors)

    engines = []
    if not args.apo.load_rollouts:
        colocated = args.train.colocate_all
        pg = policy_pg if colocated else _bundles(args, args.vllm.num_engines * args.vllm.tensor_parallel_size)
        engines = create_engines(args, policy_pg if colocated else None, pg)
    actor = ray.remote(num_gpus=1)(PolicyActor)
    fraction = 0.2 if shares else 1
    policy = RayActorGroup(args.actor.num_nodes, args.actor.num_gpus_per_node, actor, policy_pg, fraction, duplicates)
    reference = None
    if _wants_reference(args):
        reference = RayActorGroup(
            args.ref.num_nodes,
            args.ref.num_gpus_per_node,
            ray.remote(num_gpus=1)(ReferenceActor),
            policy_pg if shares else _bundles(args, args.ref.num_nodes * args.ref.num_gpus_per_node),
            fraction,
            duplicates,
        )

    model, timeout = args.actor.model_name_or_path, args.apo.timeout
    # OpenRLHF's NCCL or CUDA-IPC sync needs the engines up before the policy joins their process group.
    if cpu.has_cuda():
        get_all([engine.ready.remote() for engine in engines], timeout, "the start of the vLLM engine")
        if args.vllm.enable_sleep:  # leave the GPU to the policy while it loads
            get_all([engine.sleep.remote() for engine in engines], timeout, "the engine's sleep")
    waits = policy.async_init_model_from_pretrained(
        strategy, model, max_steps, engines if engines and cpu.has_cuda() else None
    )
    if reference:
        waits += reference.async_init_model_from_pretrained(strategy, model)
    waits += [engine.ready.remote() for engine in engines]
    get_all(waits, timeout, "the start of the policy and the engine")
    return policy, reference, engines


def _bundles(args, count: int) -> PlacementGroup:
    pg = placement_group([{"GPU": 1, "CPU": 1}] * count, strategy="PACK")
    get_all([pg.ready()], args.apo.timeout, f"Ray's placement of {count} GPUs")
    return pg


def _reward(args):
    if args.reward.name == "math_verify":
        return MathVerifyReward(args.reward.timeout)
    return UpstreamReward(args.reward.remote_url, args.reward.timeout)
