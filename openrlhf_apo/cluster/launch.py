"""Starts a run's parts on a Ray that is up: policy, reference, engines, and the trainer in this process."""

import logging
from types import SimpleNamespace
from typing import TextIO

import ray
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.utils.utils import get_tokenizer

from openrlhf_apo import cpu
from openrlhf_apo.cluster.bundles import place
from openrlhf_apo.cluster.calls import get_all
from openrlhf_apo.cluster.engine import EnginePlan, RayEngine, create_engine
from openrlhf_apo.cluster.openrlhf_update import OpenRLHFUpdate
from openrlhf_apo.cluster.policy import PolicyActor, RayPolicy, ReferenceActor
from openrlhf_apo.cluster.reward_model import RayRewardModel, reward_group
from openrlhf_apo.data.inputs import read_inputs
from openrlhf_apo.data.trackers import make_trackers
from openrlhf_apo.errors import RunError
from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy, RankPlan
from openrlhf_apo.trainer.agents import AgentEngine
from openrlhf_apo.trainer.assemble import assemble
from openrlhf_apo.trainer.model_folder import refuse_other_kind
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.resume import checkpoint_to_resume
from openrlhf_apo.trainer.run_record import write_run_record
from openrlhf_apo.trainer.stop import StopSignals

logger = logging.getLogger(__name__)


def train(plan: RunPlan, args: SimpleNamespace, console: TextIO, stop: StopSignals) -> None:
    """Run `plan` to its end. Bad data is refused before any actor starts."""
    refuse_other_kind(plan.output)
    tokenizer = get_tokenizer(args.actor.model_name_or_path, None, use_fast=not args.data.disable_fast_tokenizer)
    reward_model = RayRewardModel(plan.micro_batches, plan.timeout, args.train.colocate_all)
    inputs = read_inputs(plan, args, tokenizer, reward_model.rate)
    logger.info("%s", plan.summary(inputs.optimizer_steps))
    resume = checkpoint_to_resume(plan.output, inputs.manifest)
    if resume is not None and resume.embedded:
        raise RunError(f"the checkpoint {resume.folder} is one of --runtime embedded: go on with that, or start anew")
    write_run_record(plan, inputs.manifest, resume.rollout if resume else None)
    strategy = ApoStrategy(args, _rank_plan(plan), resume.folder.name if resume else None)
    started = _start_actors(plan, args, strategy, inputs.optimizer_steps)
    policy_group, reference_group, reward_model.group, engines, engine_pg = started
    policy = RayPolicy(policy_group, plan.micro_batches, plan.timeout, args.ds.enable_sleep)
    engine = None
    if engines:
        vllm = RayEngine(engines, engine_pg, policy, tokenizer, _engine_plan(plan, args))
        engine = AgentEngine.of(vllm, tokenizer, inputs.scorer.reward)
    foreign_update = None
    if plan.objective is None:
        controller, timeout = plan.regularizer.controller, plan.timeout
        foreign_update = OpenRLHFUpdate(policy_group, reference_group, strategy, tokenizer, controller, timeout).run
    trainer = assemble(
        plan,
        inputs,
        policy,
        engine,
        len(tokenizer),
        resume=resume is not None,
        foreign_update=foreign_update,
        trackers=make_trackers(plan, args),
        console=console,
        stop=stop,
    )
    trainer.fit()


def _rank_plan(plan: RunPlan) -> RankPlan | None:
    if plan.objective is None:
        return None
    return RankPlan(
        anchor=plan.anchor_weights,
        reference=plan.regularizer.needs_reference,
        shared=plan.reference_anchor,
        ema=plan.ema,
        kl_estimator=plan.regularizer.kl_estimator,
        entropy=plan.regularizer.entropy is not None,
        behavior=plan.behavior,
    )


def _engine_plan(plan: RunPlan, args: SimpleNamespace) -> EnginePlan:
    return EnginePlan(
        model=args.actor.model_name_or_path,
        count=args.vllm.num_engines,
        tensor_parallel=args.vllm.tensor_parallel_size,
        dtype=args.ds.param_dtype,
        max_len=plan.sampling.max_len,
        seed=plan.schedule.seed,
        eager=args.vllm.enforce_eager,
        prefix_caching=args.vllm.enable_prefix_caching,
        sleeps=args.vllm.enable_sleep,
        gpu_memory_utilization=args.vllm.gpu_memory_utilization,
        trust_remote_code=args.actor.trust_remote_code,
        timeout=plan.timeout,
        colocated=args.train.colocate_all,
        buckets=args.apo.sync == "buckets" if args.apo.sync else not cpu.has_cuda(),
        max_restarts=plan.max_engine_restarts,
    )


def _start_actors(plan: RunPlan, args: SimpleNamespace, strategy: ApoStrategy, max_steps: int):
    """Policy group, reference group or None, reward model's or None, engine actors and their place; all started at
    once, and waited for together."""
    logger.info("starting the policy (DeepSpeed) and the engine (vLLM)")
    places = place(plan.placement, plan.timeout)
    duplicates = args.ds.ring_attn_size * args.ds.tensor_parallel_size
    shares = args.train.colocate_all or args.train.colocate_actor_ref
    policy_pg, engine_pg = places["policy"], places.get("engines")

    engines = []
    if engine_pg is not None:
        engines = [create_engine(_engine_plan(plan, args), engine_pg, i) for i in range(args.vllm.num_engines)]
    actor = ray.remote(num_gpus=1)(PolicyActor)
    fraction = 0.2 if shares else 1
    policy = RayActorGroup(args.actor.num_nodes, args.actor.num_gpus_per_node, actor, policy_pg, fraction, duplicates)
    reference = None
    if "reference" in places:
        reference = RayActorGroup(
            args.ref.num_nodes,
            args.ref.num_gpus_per_node,
            ray.remote(num_gpus=1)(ReferenceActor),
            places["reference"],
            fraction,
            duplicates,
        )

    reward = None
    if "reward" in places:
        reward = reward_group(args, places["reward"], fraction if args.train.colocate_all else 1)

    model, timeout = args.actor.model_name_or_path, plan.timeout
    # OpenRLHF's NCCL or CUDA-IPC sync needs the engines up before the policy joins their process group.
    if cpu.has_cuda():
        get_all([engine.ready.remote() for engine in engines], timeout, "the start of the vLLM engine")
        if args.vllm.enable_sleep:  # leave the GPU to the policy while it loads
            get_all([engine.sleep.remote() for engine in engines], timeout, "the engine's sleep")
    joined = engines if engines and not _engine_plan(plan, args).buckets else None
    waits = policy.async_init_model_from_pretrained(strategy, model, max_steps, joined)
    if reference:
        waits += reference.async_init_model_from_pretrained(strategy, model)
    if reward:
        waits += reward.async_init_model_from_pretrained(strategy, plan.reward.model)
    waits += [engine.ready.remote() for engine in engines]
    get_all(waits, timeout, "the start of the policy and the engine")
    return policy, reference, reward, engines, engine_pg
