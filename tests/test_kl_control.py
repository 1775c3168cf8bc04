"""The KL coefficient that follows a target (--algo.kl.target, --algo.kl.horizon), and the unbiased gradient of KL
(--algo.kl.unbiased_gradient): against OpenRLHF's own, and training against plain autograd."""

import pytest
import torch
from command_lines import settings
from test_embedded import run
from test_learner import OPTIMIZER, OneRank
from test_rollout_correction import GROUPS, VOCABULARY, P, answer_log_probs, flat, group_loss, samples, surrogate
from tiny_models import tiny_qwen3

from openrlhf_apo import cpu
from openrlhf_apo.alpha import FixedAlpha
from openrlhf_apo.embedded.backend import TorchBackend
from openrlhf_apo.objectives import TOKEN_LOSSES
from openrlhf_apo.objectives.kl import unbiased_kl
from openrlhf_apo.options import run_plan
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.kl_controller import AdaptiveKl
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.token_objective import TokenObjective, TokenPlan
from openrlhf_apo.trainer.update import Update


def test_the_controller_is_openrlhfs_and_goes_on_from_its_state():
    cpu.install_for_ranks()
    from openrlhf.trainer.ppo_utils.kl_controller import AdaptiveKLController

    ours, theirs = AdaptiveKl(0.1, 0.02, 500), AdaptiveKLController(0.1, 0.02, 500)
    for kl, count in ((0.0, 64), (0.021, 64), (0.5, 32), (0.019, 64)):
        resumed = AdaptiveKl(9.0, 0.02, 500)
        resumed.load_state_dict(ours.state_dict())
        for each in (ours, resumed, theirs):
            each.update(kl, count)
        assert ours.value == pytest.approx(theirs.value, rel=1e-12)
        assert resumed.value == ours.value
    assert ours.value != 0.1


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_unbiased_gradient_is_openrlhfs(estimator):
    cpu.install_for_ranks()
    from openrlhf.models.utils import compute_approx_kl

    torch.manual_seed(0)
    old, reference, start = (-3 * torch.rand(4, 7) for _ in range(3))
    found = []
    for kl in (
        lambda theta: unbiased_kl(theta, old, reference, estimator),
        lambda theta: compute_approx_kl(theta, reference, old, estimator, unbiased_gradient=True),
    ):
        theta = start.clone().requires_grad_()
        value = kl(theta)
        found.append((value.detach(), *torch.autograd.grad(value.sum(), theta)))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    weight = (start - old).exp().clamp(max=10)
    assert torch.allclose(found[0][1], weight * (start - reference), atol=1e-5)


BETA, TARGET, HORIZON = 0.5, 1e-4, 60


def trained(loss: str, limit: MicroBatchLimit):
    model = tiny_qwen3(VOCABULARY)
    policy = OneRank(TorchBackend(model, OPTIMIZER, 1.0, reference=True), limit, entropy=False)
    if loss in TOKEN_LOSSES:
        objective = TokenObjective(policy, TokenPlan(TOKEN_LOSSES[loss](), TOKEN_LOSSES[loss].uses, 8))
    else:
        objective = GroupObjective(policy, GroupPlan(loss, controller=FixedAlpha()), VOCABULARY)
    regularizer = Regularizer(BETA, controller=AdaptiveKl(BETA, TARGET, HORIZON), unbiased_gradient=True)
    update = Update(policy, objective, groups_per_step=GROUPS // 2, epochs=2, regularizer=regularizer)
    metrics = [update.run(samples(tiny_qwen3(VOCABULARY), rollout), rollout) for rollout in range(3)]
    return flat(model), metrics


def reference(loss: str):
    """The same by plain autograd, one answer at a time."""
    model, first, old_model = (tiny_qwen3(VOCABULARY) for _ in range(3))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.0
    )
    beta, betas = BETA, []
    for rollout in range(3):
        groups = samples(first, rollout)
        old_model.load_state_dict(model.state_dict())
        kl_sum = tokens = 0.0
        for step in [groups[:3], groups[3:]] * 2:
            total, count = 0.0, sum(len(s.response_ids) for group in step for s in group)
            for group in step:
                old = {}
                for s in group:
                    with torch.no_grad():
                        before, base = (answer_log_probs(m, s.prompt_ids, s.response_ids) for m in (old_model, first))
                    old[id(s)], s.rollout_log_probs = before, before.tolist()  # all weights of surrogate are 1
                    now = answer_log_probs(model, s.prompt_ids, s.response_ids)
                    k1 = (now - base).detach()
                    per_token = 1 / count if loss == "apo" else 1 / (len(now) * P * (GROUPS // 2))
                    weight = (now - before).exp().detach()
                    total = total + beta * per_token * (weight * k1 * now).sum()
                    kl_sum, tokens = kl_sum + ((-k1).exp() - 1 + k1).sum().item(), tokens + len(now)
                objective = group_loss if loss == "apo" else surrogate
                total = total + objective(model, old_model, group, old, dict.fromkeys(old, True))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        betas.append(beta)
        beta *= 1 + min(max(kl_sum / tokens / TARGET - 1, -0.2), 0.2) * GROUPS * P / HORIZON
    return flat(model), betas


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_training_against_plain_autograd(loss):
    want, betas = reference(loss)
    start = flat(tiny_qwen3(VOCABULARY))
    for limit in (MicroBatchLimit(tokens=10_000), MicroBatchLimit(samples=3)):
        got, metrics = trained(loss, limit)
        assert ((got - want).norm() / (want - start).norm()).item() <= 1e-3
        assert [row["kl_coef"] for row in metrics] == pytest.approx(betas, rel=1e-4)
    assert len(set(betas)) == 3


@pytest.mark.parametrize("more", [["--loss", "apo"], ["--loss", "grpo"], ["--loss", "grpo", "--algo.kl.no_use_loss"]])
def test_flags_of_a_run(flags, tmp_path, more):
    kl = "--algo.kl.init_coef 0.1 --algo.kl.target 1e-9 --algo.kl.horizon 128".split()
    rows = run(flags, tmp_path, *more, "--data.max_samples", "24", *kl)
    assert rows[0]["kl_coef"] == 0.1
    for before, row in zip(rows, rows[1:], strict=False):
        up = 0.2 if before["kl"] > 0 else -0.2
        assert row["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + up * 64 / 128))


def test_openrlhfs_step_has_a_controller_whose_state_is_saved():
    kl = ["--loss", "openrlhf", "--algo.kl.init_coef", "0.1"]
    assert isinstance(run_plan(settings(*kl, "--algo.kl.target", "6")).regularizer.controller, AdaptiveKl)
    assert run_plan(settings(*kl)).regularizer.controller is None
