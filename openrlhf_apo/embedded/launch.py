"""Starts a run in this process."""

import logging
from types import SimpleNamespace
from typing import TextIO

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from openrlhf_apo import cpu
from openrlhf_apo.cpu.patches import without_deepspeed
from openrlhf_apo.data.inputs import make_tokenizer, read_inputs
from openrlhf_apo.data.trackers import make_trackers
from openrlhf_apo.embedded.backend import OptimizerPlan, TorchBackend
from openrlhf_apo.embedded.engine import EmbeddedEngine
from openrlhf_apo.embedded.policy import EmbeddedPolicy
from openrlhf_apo.embedded.reward_model import load_reward_model
from openrlhf_apo.trainer.agents import AgentEngine
from openrlhf_apo.trainer.assemble import assemble
from openrlhf_apo.trainer.model_folder import is_adapter, refuse_other_kind
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.resume import checkpoint_to_resume
from openrlhf_apo.trainer.run_record import write_run_record
from openrlhf_apo.trainer.stop import StopSignals

logger = logging.getLogger(__name__)


def train(plan: RunPlan, args: SimpleNamespace, console: TextIO, stop: StopSignals) -> None:
    """Run `plan` to its end. args: OpenRLHF's settings. console: for the live view."""
    refuse_other_kind(plan.output)
    torch.manual_seed(plan.schedule.seed)
    tokenizer = make_tokenizer(args)
    rate = load_reward_model(args, plan.micro_batches).rate if plan.reward.model else None
    inputs = read_inputs(plan, args, tokenizer, rate)
    logger.info("%s", plan.summary(inputs.optimizer_steps))
    resume = checkpoint_to_resume(plan.output, inputs.manifest)
    write_run_record(plan, inputs.manifest, resume.rollout if resume else None)
    model, adapter = load_model(args), None
    if args.actor.gradient_checkpointing_enable:
        model.gradient_checkpointing_enable({"use_reentrant": args.actor.gradient_checkpointing_reentrant})
    if args.ds.lora.rank:
        from openrlhf_apo.ranks.lora import Adapter, add_adapter  # imports peft

        torch.manual_seed(plan.schedule.seed)  # the same A, whatever was drawn before
        model = add_adapter(model, args.ds.lora.rank, args.ds.lora.alpha, args.ds.lora.target_modules)
        adapter = Adapter(model)
    backend = TorchBackend(
        model,
        OptimizerPlan(
            lr=args.actor.adam.lr,
            betas=tuple(args.actor.adam.betas),
            eps=args.actor.adam.eps,
            weight_decay=args.actor.adam.weight_decay,
            max_norm=args.actor.max_norm,
            scheduler=args.actor.lr_scheduler,
            warmup_ratio=args.actor.lr_warmup_ratio,
            min_lr_ratio=args.actor.min_lr_ratio,
            steps=inputs.optimizer_steps,
        ),
        plan.sampling.temperature,
        anchor=plan.anchor_weights,
        reference=plan.regularizer.needs_reference,
        shared=plan.reference_anchor,
        adapter=adapter,
        ema=plan.ema,
    )
    policy = EmbeddedPolicy(
        backend,
        tokenizer,
        limit=plan.micro_batches,
        kl_estimator=plan.regularizer.kl_estimator,
        entropy=plan.regularizer.entropy is not None,
        behavior=plan.behavior,
        checkpoints=plan.output.checkpoints,
        output=plan.output.directory,
        merge_lora=args.ckpt.merge_lora,
        resume=resume,
    )
    engine = None
    if not plan.saved_rollouts:
        engine = AgentEngine.of(EmbeddedEngine(model, tokenizer), tokenizer, inputs.scorer.reward)
    trainer = assemble(
        plan,
        inputs,
        policy,
        engine,
        len(tokenizer),
        resume=resume is not None,
        trackers=make_trackers(plan, args),
        console=console,
        stop=stop,
    )
    trainer.fit()


def load_model(args: SimpleNamespace) -> PreTrainedModel:
    """The policy of a run; of the folder of an adapter, its base model with it merged. args: OpenRLHF's settings."""
    path = args.actor.model_name_or_path
    settings = {
        "trust_remote_code": args.actor.trust_remote_code,
        "dtype": torch.float32,
        "attn_implementation": args.ds.attn_implementation,
    }
    if is_adapter(path):
        from peft import AutoPeftModelForCausalLM

        with without_deepspeed():
            model = AutoPeftModelForCausalLM.from_pretrained(path, **settings).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **settings)
    return model.to("cuda" if cpu.has_cuda() else "cpu")
