"""What a step costs in forwards, and that the cheap ways are the plain one."""

import random

import pytest
import torch
from tiny_models import tiny_qwen3

from openrlhf_apo.alpha import GuardedAlpha
from openrlhf_apo.embedded.backend import OptimizerPlan, TorchBackend
from openrlhf_apo.objectives import TOKEN_LOSSES
from openrlhf_apo.ranks.learner import Learner
from openrlhf_apo.trainer.anchor import AnchorSettings
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.sharded_policy import ShardedPolicy
from openrlhf_apo.trainer.token_objective import TokenObjective, TokenPlan
from openrlhf_apo.trainer.update import Update

VOCABULARY, P, GROUPS = 32, 4, 8
OPTIMIZER = OptimizerPlan(
    lr=1e-3,
    betas=(0.0, 0.95),
    eps=1e-2,
    weight_decay=0.0,
    max_norm=0.0,
    scheduler="constant",
    warmup_ratio=0.0,
    min_lr_ratio=0.0,
    steps=8,
)


class Counted(TorchBackend):
    """Notes each forward: weights, and whether it is for a backward pass."""

    calls: list[tuple[str, bool]]

    def forward(self, weights, batch, *, train=False, entropy=False):
        self.calls.append((weights, train))
        return super().forward(weights, batch, train=train, entropy=entropy)


class OneRank(ShardedPolicy):
    def __init__(self, backend, limit: MicroBatchLimit, entropy: bool, behavior: str = "policy"):
        super().__init__(1, limit)
        self.learner = Learner(backend, pad_token_id=0, entropy=entropy, behavior=behavior)

    def call_ranks(self, method, arguments):
        return [getattr(self.learner, method)(*arguments(0))]


def groups() -> list[list[Sample]]:
    rng = random.Random(0)

    def sample(group: int) -> Sample:
        prompt, response = ([rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 7))] for _ in range(2))
        return Sample(
            group, f"p{group}", "", "", prompt, response, "", [-1.0] * len(response), False, float(rng.randrange(3))
        )

    return [[sample(group) for _ in range(P)] for group in range(GROUPS)]


def run(loss: str, limit: MicroBatchLimit, anchor: str = "rollout", entropy: float | None = None):
    """Two steps, twice each -> (calls of each step, final weights)."""
    model = tiny_qwen3(VOCABULARY)
    backend = Counted(model, OPTIMIZER, temperature=1.0, anchor=anchor != "rollout")
    backend.calls = []
    policy = OneRank(backend, limit, entropy is not None)
    if loss in TOKEN_LOSSES:
        objective = TokenObjective(policy, TokenPlan(TOKEN_LOSSES[loss](), TOKEN_LOSSES[loss].uses, 8))
    else:
        plan = GroupPlan(loss, controller=GuardedAlpha(), anchor=AnchorSettings(anchor))
        objective = GroupObjective(policy, plan, VOCABULARY)
    update = Update(policy, objective, groups_per_step=GROUPS // 2, epochs=2, regularizer=Regularizer(entropy=entropy))
    update.run(groups(), 0)
    return backend.calls, torch.cat([weight.detach().flatten() for weight in model.parameters()])


ONE = MicroBatchLimit(tokens=10_000)
TRAINED, LOOKED_AT = ("policy", True), ("policy", False)


@pytest.mark.parametrize(
    "loss, anchor, calls",
    [
        # ℓ^anchor of step 2 is looked at before the first update; every other forward is one that trains.
        ("apo", "rollout", [LOOKED_AT, *[TRAINED] * 4]),
        ("apo", "ema", [TRAINED if k % 2 else ("anchor", False) for k in range(8)]),
        ("grpo", "rollout", [LOOKED_AT, *[TRAINED] * 4]),
        ("bapo", "rollout", [LOOKED_AT, *[TRAINED] * 4]),  # its clip bounds come from the ratios of the whole step
        ("gtpo", "rollout", [LOOKED_AT, *[TRAINED] * 4]),  # the entropies of step 1 come from the forward that trains
    ],
)
def test_a_step_that_is_one_micro_batch_is_forwarded_once(loss, anchor, calls):
    assert run(loss, ONE, anchor)[0] == calls


def test_of_several_micro_batches_one_is_forwarded_once():
    calls, _ = run("apo", MicroBatchLimit(samples=4))  # 4 micro-batches a step
    assert calls.count(TRAINED) == 4 * 4
    assert calls.count(LOOKED_AT) == 4 + 3 * 3  # ℓ^anchor of step 2; three steps off the anchor


@pytest.mark.parametrize(
    "loss, anchor", [("apo", "rollout"), ("apo", "ema"), ("bapo", "rollout"), ("gtpo", "rollout")]
)
@pytest.mark.parametrize("entropy", [None, 0.01])
def test_a_kept_forward_trains_like_a_new_one(loss, anchor, entropy):
    kept = run(loss, ONE, anchor, entropy)[1]
    again = run(loss, MicroBatchLimit(samples=1), anchor, entropy)[1]
    assert (kept - again).norm() / again.norm() <= 1e-6


def mismatch_of(samples: list[list[Sample]]) -> float | None:
    model = tiny_qwen3(VOCABULARY)
    policy = OneRank(TorchBackend(model, OPTIMIZER, temperature=1.0), MicroBatchLimit(samples=3), False)
    objective = GroupObjective(policy, GroupPlan("apo", controller=GuardedAlpha()), VOCABULARY)
    return Update(policy, objective, groups_per_step=GROUPS, epochs=1).run(samples, 0).get("rollout_mismatch")


def test_the_mismatch_is_that_of_fresh_samples():
    fresh = groups()
    for sample in (sample for group in fresh[3:] for sample in group):
        sample.stale, sample.rollout_log_probs = True, [-100.0] * len(sample.response_ids)
    alone = mismatch_of(fresh[:3])
    assert alone == pytest.approx(mismatch_of(fresh), rel=1e-5) and alone < 10
    assert mismatch_of(fresh[3:]) is None
    for sample in fresh[3]:
        sample.stale = False
    assert mismatch_of(fresh) > 10
