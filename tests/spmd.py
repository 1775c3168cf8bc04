"""Ranks without Ray: every process runs the same driver code and computes its own share, as a PolicyHandle.

Run by test_exactness.py: `python tests/spmd.py JOB.json`, once per rank with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set. The job names model, samples, and a list of cases (ZeRO stage or "embedded", micro-batch size, and
what else differs from the job); rank 0 writes, per case, each step's gradient and the final weights.
"""

import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist

from openrlhf_apo.alpha import GuardedAlpha
from openrlhf_apo.embedded.backend import OptimizerPlan, TorchBackend
from openrlhf_apo.objectives import TOKEN_LOSSES, Adrpo
from openrlhf_apo.ranks import shared_prompts
from openrlhf_apo.ranks.deepspeed.anchor_weights import AdapterAnchor, AnchorWeights
from openrlhf_apo.ranks.deepspeed.backend import DeepSpeedBackend
from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy, RankPlan
from openrlhf_apo.ranks.deepspeed.weight_average import WeightAverage, writable
from openrlhf_apo.ranks.learner import Learner
from openrlhf_apo.ranks.lora import Adapter, add_adapter
from openrlhf_apo.trainer.anchor import AnchorSettings
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import whole_groups
from openrlhf_apo.trainer.sharded_policy import ShardedPolicy
from openrlhf_apo.trainer.token_objective import TokenObjective, TokenPlan
from openrlhf_apo.trainer.update import Update

# DeepSpeed and OpenRLHF are imported where they are used: openrlhf_apo.ranks.deepspeed prepares this process for them.

ADAM = {"betas": (0.0, 0.95), "eps": 1e-2, "weight_decay": 0.0}  # β1 = 0: exp_avg is the gradient


REGULARIZERS = {
    None: Regularizer(),
    "kl": Regularizer(kl=0.1, entropy=0.01),
    "kl_reward": Regularizer(kl=0.1, kl_in_reward=True),
    "adrpo": Regularizer(adrpo=Adrpo(beta_0=0.1, beta_min=-0.5)),
}


class SpmdPolicy(ShardedPolicy):
    """PolicyHandle in which the calling process is one of the ranks."""

    def __init__(self, learner: Learner, limit: MicroBatchLimit):
        super().__init__(dist.get_world_size(), limit)
        self.learner = learner
        self.gradients: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []  # after each step

    def call_ranks(self, method, arguments):
        mine = getattr(self.learner, method)(*arguments(dist.get_rank()))
        everyone = [None] * self.num_ranks
        dist.all_gather_object(everyone, mine)
        return everyone

    def apply(self, step, terms):
        report = super().apply(step, terms)
        self.gradients.append(full_state(self.learner.backend, "exp_avg"))
        self.weights.append(full_state(self.learner.backend, None))
        return report


def full_state(backend: DeepSpeedBackend | TorchBackend, name: str | None) -> torch.Tensor:
    """One vector of an optimizer state (or the weights, for None) over all that trains, whatever the sharding."""
    if isinstance(backend, TorchBackend):
        state = backend.optimizer.state
        return torch.cat([(state[w][name] if name else w).detach().flatten() for w in backend.trained.values()])
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = backend.policy.model
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed linked the parameters to their optimizer states before the first step had made those.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    parts = []
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_optimization():
            value = safe_get_full_optimizer_state(parameter, name) if name else safe_get_full_fp32_param(parameter)
        else:
            value = engine.optimizer.state[parameter][name] if name else parameter
        parts.append(value.detach().float().flatten().clone())
    return torch.cat(parts)


def settings(job: dict, zero_stage: int) -> SimpleNamespace:
    return SimpleNamespace(
        local_rank=-1,
        train=SimpleNamespace(seed=0, full_determinism_enable=False, micro_batch_size=1, batch_size=job["step_size"]),
        actor=SimpleNamespace(max_norm=0.0),
        ds=SimpleNamespace(zero_stage=zero_stage, param_dtype="fp32", enable_sleep=False),
    )


def has_anchor(job: dict) -> bool:
    return job["anchor"] != "rollout" or job["behavior"] == "anchor"


def embedded_backend(job: dict) -> TorchBackend:
    from transformers import AutoModelForCausalLM

    plan = OptimizerPlan(job["lr"], ADAM["betas"], ADAM["eps"], ADAM["weight_decay"], 0.0, "constant", 0.0, 0.0, 100)
    anchor, reference = has_anchor(job), job["regularizer"] is not None
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    adapter = None
    if job["lora"]:
        torch.manual_seed(0)
        model = add_adapter(model, job["lora"], 16, "all-linear")
        adapter = Adapter(model)
    return TorchBackend(model, plan, 1.0, anchor=anchor, reference=reference, adapter=adapter, ema=job.get("ema"))


def deepspeed_backend(job: dict) -> DeepSpeedBackend:
    from openrlhf.models import Actor

    zero_stage = job["zero_stage"]
    strategy = ApoStrategy(settings(job, zero_stage), RankPlan())
    strategy.setup_distributed()

    def load(config, **lora):
        return Actor(job["model"], attn_implementation="sdpa", param_dtype="fp32", ds_config=config, **lora)

    optimizer = {
        "optim": "adam",
        "adam": ADAM | {"lr": job["lr"]},
        "lr_scheduler": "constant",
        "max_norm": 0.0,
        "scheduler_steps": 100,
    }
    torch.manual_seed(0)
    lora = {"lora_rank": job["lora"], "target_modules": "all-linear"}
    actor, _, scheduler = strategy.prepare((load(strategy.get_ds_train_config(), **lora), optimizer))
    if job["lora"]:
        adapter = Adapter(actor.model.module, partial(writable, sharded=zero_stage == 3))
        anchor = AdapterAnchor(actor, zero_stage) if has_anchor(job) else None
        return DeepSpeedBackend(strategy, actor, scheduler, anchor, actor, adapter=adapter)
    anchor = reference = None
    if has_anchor(job):
        anchor = AnchorWeights(strategy.prepare(load(strategy.get_ds_eval_config())), zero_stage)
    if job["regularizer"]:
        reference = strategy.prepare(load(strategy.get_ds_eval_config()))
    ema = WeightAverage(actor, zero_stage) if "ema" in job else None
    return DeepSpeedBackend(strategy, actor, scheduler, anchor, reference, ema=ema, ema_beta=job.get("ema"))


def averages(backend: DeepSpeedBackend | TorchBackend) -> dict:
    """The moving average of the policy; with DeepSpeed also the policy's weights while the average is in their place,
    and whether they are bit by bit their own again."""
    if isinstance(backend, TorchBackend):
        return {"ema": torch.cat([w.flatten() for w in backend.models["ema"].parameters()])}

    def flat(average: WeightAverage) -> torch.Tensor:
        return torch.cat([weight.flatten() for weight in average.state_dict().values()])

    def policys() -> torch.Tensor:
        return flat(WeightAverage(backend.policy, backend.strategy.stage))

    before = policys()
    with backend.ema.in_place_of(backend.policy):
        lent = policys()
    return {"ema": flat(backend.ema), "lent": lent, "restored": torch.equal(policys(), before)}


def run_case(job: dict) -> dict:
    backend = embedded_backend(job) if job["zero_stage"] == "embedded" else deepspeed_backend(job)
    entropy, behavior = job["regularizer"] == "kl", job["behavior"]
    learner = Learner(backend, pad_token_id=0, entropy=entropy, behavior=behavior)
    policy = SpmdPolicy(learner, MicroBatchLimit(**job["limit"]))
    if job["loss"] in TOKEN_LOSSES:
        loss = TOKEN_LOSSES[job["loss"]]
        objective = TokenObjective(policy, TokenPlan(loss(), loss.uses, max_length=20), behavior)
    else:
        controller = GuardedAlpha() if job["loss"] == "apo" else None
        anchor = AnchorSettings(job["anchor"], interval=2, beta=0.5)
        plan = GroupPlan(job["loss"], controller=controller, anchor=anchor)
        objective = GroupObjective(policy, plan, vocab_size=128, behavior=behavior)
    update = Update(
        policy,
        objective,
        groups_per_step=job["step_size"] // job["group_size"],
        epochs=job["epochs"],
        regularizer=REGULARIZERS[job["regularizer"]],
        behavior=behavior,
    )
    metrics = []
    for rollout in range(job["num_rollouts"]):
        samples = RolloutFiles(job["samples"]).read(rollout + 1)
        metrics.append(update.run(whole_groups(samples, job["group_size"]), rollout))
    weights = full_state(backend, None)
    result = {"gradients": policy.gradients, "weights": weights, "metrics": metrics}
    return result | averages(backend) | {"trajectory": policy.weights} if "ema" in job else result


if __name__ == "__main__":
    torch.set_num_threads(1)
    shared_prompts.FEWEST_SPARED = 1  # prompts here are short
    with open(sys.argv[1]) as file:
        job = json.load(file)
    dist.init_process_group("gloo")
    for case in job["cases"]:
        result = run_case(job | case)
        if int(os.environ["RANK"]) == 0:
            torch.save(result, case["out"])
    # Together, and before the interpreter ends: a rank that leaves kills gloo's threads of one that still works.
    dist.barrier()
    dist.destroy_process_group()
