"""One rollout of an objective on the smallest real policy: a table of log-probs, updated by plain SGD."""

import math

import pytest
import torch

from openrlhf_apo.alpha import EssAlpha, FixedAlpha, GuardedAlpha
from openrlhf_apo.objectives import AlphaDivergenceLoss, GroupTargetBuilder
from openrlhf_apo.trainer.anchor import AnchorSettings
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan, GroupSettings
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.step import Report
from openrlhf_apo.trainer.update import Update

P = 4


class TablePolicy:
    """PolicyHandle: π is a softmax over 16 tokens at every position; one parameter vector."""

    def __init__(self):
        self.logits = torch.linspace(-1, 1, 16, dtype=torch.float64).requires_grad_()
        self.anchor = self.logits.detach().clone()
        self.calls: list[str] = []

    def _sums(self, logits, samples):
        log_probs = logits.log_softmax(-1)
        return torch.stack([log_probs[torch.tensor(s.response_ids)].sum() for s in samples])

    def load_steps(self, steps):
        self.steps = steps

    def log_prob_sums(self, step, weights="policy", keep_graph=False):
        self.calls.append(weights)
        return self._sums(self.anchor if weights == "anchor" else self.logits.detach(), self.steps[step]).tolist()

    def apply(self, step, terms):
        self.calls.append("apply")
        self.coefficients = coefficients = terms.columns["log_prob"]
        sums = self._sums(self.logits, self.steps[step])
        (gradient,) = torch.autograd.grad((coefficients * sums).sum(), self.logits)
        with torch.no_grad():
            self.logits -= 0.5 * gradient
        return Report(
            sums.tolist(), [0.0] * len(sums), gradient.norm().item(), 0.5, 0.0, {"mismatch": 1e-6, "fresh": 1.0}, 1.0
        )

    def update_anchor(self, beta):
        self.calls.append(f"update {beta}")
        self.anchor.lerp_(self.logits.detach(), 1 - beta)


def groups(count=4, rewards=(0.0, 0.25, 0.5, 1.0)) -> list[list[Sample]]:
    def sample(g: int, i: int, reward: float) -> Sample:
        length = 1 + i + g
        response = [(g + 3 * i + k) % 16 for k in range(length)]
        return Sample(g, f"p{g}", "", "", [1], response, "", [-2.0] * length, False, reward)

    return [[sample(g, i, reward) for i, reward in enumerate(rewards)] for g in range(count)]


def update(
    policy, controller=None, *, anchor="rollout", interval=2, groups_per_step=2, epochs=1, **settings
) -> Update:
    plan = GroupPlan(
        "apo",
        controller=controller or FixedAlpha(),
        settings=GroupSettings(**settings),
        anchor=AnchorSettings(anchor, interval, beta=0.9),
    )
    objective = GroupObjective(policy, plan, vocab_size=16)
    return Update(policy, objective, groups_per_step=groups_per_step, epochs=epochs)


def test_the_first_on_policy_step_costs_no_forward_of_its_own():
    policy = TablePolicy()
    metrics = update(policy).run(groups(), rollout=0)
    assert policy.calls == ["policy", "apply", "policy", "apply"]  # anchor of step 1, step 0, ℓ of step 1, step 1
    assert metrics["inner/log_ratio_std"][0] == 0.0 < metrics["inner/log_ratio_std"][1]
    policy.calls.clear()
    update(policy, groups_per_step=4).run(groups(), rollout=0)
    assert policy.calls == ["apply"]


def test_later_epochs_take_the_anchor_from_the_training_forward():
    policy = TablePolicy()
    start = policy.logits.detach().clone()
    metrics = update(policy, groups_per_step=4, epochs=2).run(groups(), rollout=0)
    assert policy.calls == ["apply", "policy", "apply"]
    moved = policy._sums(policy.logits.detach(), policy.steps[0]) - policy._sums(start, policy.steps[0])
    assert moved.abs().max() > 0 and metrics["log_ratio_std"] > 0


def test_lagged_anchor_refreshes_every_interval():
    policy = TablePolicy()
    trainer = update(policy, anchor="lagged", groups_per_step=4)
    spread = []
    for rollout in range(4):
        spread.append(trainer.run(groups(), rollout)["log_ratio_std"])
    assert [s > 0 for s in spread] == [False, True, False, True]
    assert policy.calls.count("update 0.0") == 2


def test_lagged_anchor_refreshes_on_a_rollout_without_groups():
    policy = TablePolicy()
    trainer = update(policy, anchor="lagged", groups_per_step=4)
    trainer.run(groups(), 0)
    trainer.run(groups(), 1)
    assert trainer.run([], 2) == {} and policy.calls.count("update 0.0") == 2
    assert torch.equal(policy.anchor, policy.logits.detach())


def test_ema_anchor_follows_every_update_and_reference_never_moves():
    policy = TablePolicy()
    update(policy, anchor="ema").run(groups(), 0)
    assert policy.calls.count("update 0.9") == 2
    policy = TablePolicy()
    before = policy.anchor.clone()
    update(policy, anchor="reference").run(groups(), 0)
    assert torch.equal(policy.anchor, before) and not any(call.startswith("update") for call in policy.calls)


def test_coefficients_are_the_gradient_of_the_mean_divergence_over_prompts():
    for reduction, scale in (("sum", lambda n: 1.0), ("mean", lambda n: 1.0 / n), ("const", lambda n: 0.1)):
        policy, loss = TablePolicy(), AlphaDivergenceLoss()
        update(policy, groups_per_step=4, reduction=reduction, reduction_const=10.0).run(groups(), 0)
        sums = torch.zeros(4, P, dtype=torch.float64, requires_grad=True)
        lengths = torch.tensor([[float(len(s.response_ids)) for s in group] for group in groups()])
        rewards = torch.tensor([[s.reward for s in group] for group in groups()], dtype=torch.float64)
        scales = torch.tensor([[scale(n) for n in row] for row in lengths.tolist()], dtype=torch.float64)
        (want,) = torch.autograd.grad(loss(sums * scales, GroupTargetBuilder()(rewards), 0.6).mean(), sums)
        assert torch.allclose(policy.coefficients.view(4, P), want, rtol=1e-9, atol=1e-15)


def test_zero_variance_groups_are_kept_or_dropped_and_counted():
    mixed = groups(2) + [[Sample(9, "q", "", "", [1], [i + 1], "", [-2.0], False, 1.0) for i in range(P)]]
    metrics = update(TablePolicy(), groups_per_step=1, epochs=2).run(mixed, 0)
    assert metrics["inner/zero_variance_fraction"] == [0.0, 0.0, 1.0] * 2
    assert metrics["zero_variance_fraction"] == pytest.approx(1 / 3)
    for drop in (False, True):
        policy = TablePolicy()
        metrics = update(policy, groups_per_step=3, epochs=2, drop_zero_variance=drop).run(mixed, 0)
        assert metrics["zero_variance_fraction"] == pytest.approx(1 / 3)
        off_anchor = policy.coefficients.view(3, P)  # of the second epoch, where θ has left the anchor
        assert bool((off_anchor[2] == 0).all()) == drop
        assert (off_anchor[:2] != 0).all()


def test_a_policy_far_from_its_target_has_finite_metrics():
    policy = TablePolicy()
    sums = policy.log_prob_sums
    policy.log_prob_sums = lambda *step, **how: [ell + 2000.0 * (k % 2) for k, ell in enumerate(sums(*step, **how))]
    metrics = update(policy, groups_per_step=4, epochs=2).run(groups(), 0)
    assert math.isfinite(metrics["max_weight"]) and metrics["log_ratio_std"] > 500


def test_confidence_sources():
    policy = TablePolicy()
    candidate = update(policy, GuardedAlpha(), groups_per_step=4, epochs=2).run(groups(), 0)
    relative = update(TablePolicy(), GuardedAlpha(confidence="relative"), groups_per_step=4, epochs=2).run(groups(), 0)
    assert 0 < candidate["confidence"] < relative["confidence"] <= 1
    token = update(TablePolicy(), GuardedAlpha(confidence="token"), groups_per_step=4).run(groups(), 0)
    assert token["confidence"] == pytest.approx(1 - 2.0 / math.log(16))


def test_the_metrics_of_each_mode():
    fixed = update(TablePolicy()).run(groups(), 0)
    guarded = update(TablePolicy(), GuardedAlpha()).run(groups(), 0)
    ess = update(TablePolicy(), EssAlpha()).run(groups(), 0)
    shared = """alpha divergence ess entropy_p entropy_q max_weight zero_variance_fraction log_ratio_std grad_norm lr
    rollout_mismatch""".split()
    for metrics in (fixed, guarded, ess):
        assert [key for key in shared if key not in metrics] == []
        assert len(metrics["inner/alpha"]) == 2
    assert "confidence" not in fixed and "ess_outcome" not in fixed
    assert {"confidence", "improvement", "reward_baseline", "reward_scale"} <= guarded.keys()
    assert ess["ess_outcome"] in ("root", "clamped_hi", "clamped_lo", "skipped")


def test_alpha_per_group():
    policy = TablePolicy()
    metrics = update(policy, EssAlpha(scope="group", rho=1.0), groups_per_step=4).run(groups(), 0)
    assert sum(metrics["ess_outcome"].values()) == 4
    assert policy.coefficients.view(4, P).sum(-1).abs().max() < 1e-12
