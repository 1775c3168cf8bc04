"""The group maths against 50-digit arithmetic, autograd and finite differences."""

import math
import os
import subprocess
import sys
from pathlib import Path

import mpmath as mp
import pytest
import torch

import openrlhf_apo.objectives as objectives
from openrlhf_apo.objectives import (
    AlphaDivergenceLoss,
    GroupTargetBuilder,
    alpha_divergence,
    anchored_log_policy,
    ess,
    normalized_entropy,
)

mp.mp.dps = 50

TAU = 0.8
ALPHAS = [0.0, 1e-4, 0.01, 0.35, 0.5, 0.6, 0.9, 0.99, 1 - 1e-4, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# The oracle: Equations 7-9 and 11 as printed, with 50 digits, on the exact float64 inputs.


def exact_softmax(logits):
    weights = [mp.exp(x) for x in logits]
    total = mp.fsum(weights)
    return [w / total for w in weights]


def exact_policy(log_ratio):
    return exact_softmax([mp.mpf(x) / mp.mpf(TAU) for x in log_ratio.tolist()])


def exact_divergence(q, p, alpha):
    if alpha == 0:
        return mp.fsum(b * mp.log(b / a) for a, b in zip(q, p, strict=True))
    if alpha == 1:
        return mp.fsum(a * mp.log(a / b) for a, b in zip(q, p, strict=True))
    alpha = mp.mpf(alpha)
    return (1 - mp.fsum(a**alpha * b ** (1 - alpha) for a, b in zip(q, p, strict=True))) / (alpha * (1 - alpha))


def exact_coefficients(q, p, alpha, clip=None):
    tau = mp.mpf(TAU)
    if alpha == 0:
        kl = exact_divergence(q, p, 0)
        return [b * (mp.log(b / a) - kl) / tau for a, b in zip(q, p, strict=True)]
    alpha = mp.mpf(alpha)
    ratio = [(a / b) ** alpha for a, b in zip(q, p, strict=True)]
    if clip is not None:
        ratio = [min(max(r, mp.mpf(clip[0])), mp.mpf(clip[1])) for r in ratio]
    w = [b * r for b, r in zip(p, ratio, strict=True)]
    total = mp.fsum(w)
    return [-(x - b * total) / (alpha * tau) for x, b in zip(w, p, strict=True)]


def relative_error(value, exact):
    return float(abs(value - exact) / abs(exact))


def relative_norm_error(values, exact):
    difference = mp.norm([mp.mpf(v) - e for v, e in zip(values.tolist(), exact, strict=True)])
    return float(difference / mp.norm(exact))


# ---------------------------------------------------------------------------------------------------------------------
# The cases: one group each, from ordinary to extreme.


def group(kind, size, seed):
    """log_ratio[1, P], log_q[1, P] of the given kind."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(1, size, generator=generator, dtype=torch.float64)
    rewards = torch.randn(1, size, generator=generator, dtype=torch.float64)
    beta_r = 1.0
    if kind == "binary":
        rewards = torch.zeros(1, size)
        rewards[0, 0] = 1.0
    elif kind == "zero_variance":
        rewards = torch.full((1, size), 0.1)
    elif kind == "greedy_target":
        beta_r = 0.05
    log_q = GroupTargetBuilder(beta_r)(rewards)

    log_ratio = 60 * uniform - 30
    if kind == "on_policy":
        log_ratio = torch.zeros(1, size)
    elif kind == "saturated":  # p puts all but e^-75 on one completion, as far from q's favourite as can be
        log_ratio = torch.full((1, size), -30.0, dtype=torch.float64)
        log_ratio[0, rewards.argmin()] = 30.0
    elif kind == "both_saturated":
        log_q = torch.log_softmax(50 * torch.nn.functional.one_hot(rewards.argmax(-1), size).double(), dim=-1)
        log_ratio = TAU * 1.5 * log_q
    elif kind.startswith("near_"):
        log_ratio = TAU * log_q + float(kind.removeprefix("near_")) * (uniform - 0.5)
    return log_ratio, log_q


KINDS = [
    "wide", "binary", "zero_variance", "greedy_target", "on_policy", "saturated", "both_saturated",
    "near_1e-1", "near_1e-3", "near_1e-5", "near_1e-7",
]  # fmt: skip
CASES = [(kind, size, seed) for kind in KINDS for size, seed in [(2, 0), (3, 1), (8, 2), (8, 3), (33, 4)]]
CASES += [(kind, 512, 5) for kind in ("wide", "saturated", "near_1e-5")]


@pytest.mark.parametrize(("kind", "size", "seed"), CASES)
def test_value_and_coefficients_match_50_digits(kind, size, seed):
    log_ratio, log_q = group(kind, size, seed)
    q, p = exact_softmax(log_q[0].tolist()), exact_policy(log_ratio[0])
    loss = AlphaDivergenceLoss(TAU)
    for alpha in ALPHAS:
        exact = exact_divergence(q, p, alpha)
        assert exact > 0
        assert relative_error(loss(log_ratio, log_q, alpha).item(), exact) < 1e-6, alpha
        coefficients = loss.coefficients(log_ratio, log_q, alpha)[0]
        assert relative_norm_error(coefficients, exact_coefficients(q, p, alpha)) < 1e-6, alpha


@pytest.mark.parametrize("distance", [1e-2, 1e-6, 1e-10])
def test_divergence_of_given_distributions_stays_exact_where_it_is_tiny(distance):
    """On log_q and log_p as they are, D down to 1e-21: equation 7 in float64 has lost every digit by 1e-16."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 8, generator=generator, dtype=torch.float64)
    log_q = torch.log_softmax(logits, dim=-1)
    log_p = torch.log_softmax(logits + distance * torch.randn(2, 8, generator=generator).double(), dim=-1)
    for alpha in ALPHAS:
        for g, value in enumerate(alpha_divergence(log_q, log_p, alpha).tolist()):
            exact = exact_divergence(exact_softmax(log_q[g].tolist()), exact_softmax(log_p[g].tolist()), alpha)
            assert exact < distance**2
            # |log q - log p| is exact here; what is left is how far the inputs are from normalised, relative to it.
            assert relative_error(value, exact) < max(1e-12, 1e-15 / distance)


def test_divergence_of_equal_distributions_is_exactly_zero():
    log_q = torch.log_softmax(torch.tensor([[3.0, -1.0, 0.5], [0.0, 0.0, 0.0]]).double(), dim=-1)
    for alpha in ALPHAS:
        assert alpha_divergence(log_q, log_q, alpha).tolist() == [0.0, 0.0]


def test_nothing_overflows_far_outside_the_specified_range():
    log_ratio = torch.tensor([[-3000.0, 0.0, 3000.0, 10.0]]).double()
    log_q = GroupTargetBuilder(beta_r=1e-3)(torch.tensor([[1.0, 0.0, 0.0, 0.5]]))
    for alpha in ALPHAS:
        for loss in (AlphaDivergenceLoss(TAU), AlphaDivergenceLoss(TAU, weight_clip=(0.1, 10.0))):
            assert loss(log_ratio, log_q, alpha).isfinite().all()
            assert loss.coefficients(log_ratio, log_q, alpha).isfinite().all()


def test_alpha_per_group_equals_alpha_one_by_one():
    log_ratio, log_q = (torch.cat(x) for x in zip(*(group("wide", 8, seed) for seed in range(3)), strict=True))
    alphas = [0.0, 0.6, 1.0]
    column = torch.tensor(alphas, dtype=torch.float64)
    for clip in (None, (0.5, 2.0)):
        loss = AlphaDivergenceLoss(TAU, clip)
        values = loss(log_ratio, log_q, column)
        coefficients = loss.coefficients(log_ratio, log_q, column)
        for g, alpha in enumerate(alphas):
            assert values[g] == loss(log_ratio[g : g + 1], log_q[g : g + 1], alpha)[0]
            torch.testing.assert_close(
                coefficients[g], loss.coefficients(log_ratio[g : g + 1], log_q[g : g + 1], alpha)[0]
            )


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["binary", "on_policy", "near_1e-1"])
def test_coefficients_equal_autograd_and_finite_differences(kind, alpha):
    log_ratio, log_q = group(kind, 8, 0)
    log_ratio = (log_ratio.double() / 10).requires_grad_()
    loss = AlphaDivergenceLoss(TAU)
    coefficients = loss.coefficients(log_ratio, log_q, alpha)

    (through_loss,) = torch.autograd.grad(loss(log_ratio, log_q, alpha).sum(), log_ratio)
    assert torch.equal(through_loss, coefficients)

    composed = alpha_divergence(log_q, anchored_log_policy(log_ratio, TAU), alpha)
    (through_policy,) = torch.autograd.grad(composed.sum(), log_ratio)
    torch.testing.assert_close(through_policy, coefficients, rtol=1e-10, atol=1e-14)

    h = 1e-5
    for i in range(8):
        step = torch.zeros(1, 8, dtype=torch.float64)
        step[0, i] = h
        numeric = (loss(log_ratio + step, log_q, alpha) - loss(log_ratio - step, log_q, alpha)) / (2 * h)
        assert numeric.item() == pytest.approx(coefficients[0, i].item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence_is_differentiable_in_both_arguments(alpha):
    """gradcheck over logits: finite differences of the value against the derivatives it carries."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(
        lambda a, b: alpha_divergence(torch.log_softmax(a, dim=-1), torch.log_softmax(b, dim=-1), alpha), logits
    )


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_sum_to_zero(kind):
    log_ratio, log_q = group(kind, 33, 0)
    for alpha in ALPHAS:
        for clip in (None, (0.9, 1.2)):
            coefficients = AlphaDivergenceLoss(TAU, clip).coefficients(log_ratio, log_q, alpha)
            assert abs(coefficients.sum()) <= 1e-14 * coefficients.abs().sum()


@pytest.mark.parametrize("clip", [(0.5, 2.0), (1.0, 1.5), (0.7, 1.0)])
@pytest.mark.parametrize("kind", ["wide", "on_policy", "zero_variance", "near_1e-1"])
def test_weight_clip_acts_on_the_gradient_only(kind, clip):
    log_ratio, log_q = group(kind, 8, 1)
    log_ratio = log_ratio.double().requires_grad_()
    loss = AlphaDivergenceLoss(TAU, weight_clip=clip)
    q, p = exact_softmax(log_q[0].tolist()), exact_policy(log_ratio[0])
    for alpha in [1e-4, 0.35, 0.9, 1.0]:
        value = loss(log_ratio, log_q, alpha)
        assert value.item() == AlphaDivergenceLoss(TAU)(log_ratio, log_q, alpha).item()
        coefficients = loss.coefficients(log_ratio, log_q, alpha)
        assert torch.equal(torch.autograd.grad(value.sum(), log_ratio)[0], coefficients)
        assert relative_norm_error(coefficients[0], exact_coefficients(q, p, alpha, clip)) < 1e-6


def test_weight_clip_matters_when_weights_are_extreme_and_not_otherwise():
    log_ratio, log_q = group("wide", 8, 1)
    plain = AlphaDivergenceLoss(TAU).coefficients(log_ratio, log_q, 0.6)
    assert not torch.allclose(AlphaDivergenceLoss(TAU, (0.5, 2.0)).coefficients(log_ratio, log_q, 0.6), plain)
    assert torch.equal(AlphaDivergenceLoss(TAU, (1e-30, 1e30)).coefficients(log_ratio, log_q, 0.6), plain)


def test_float32_inputs_are_evaluated_in_float64():
    log_ratio = torch.tensor([[0.5, -0.25, 0.125]], requires_grad=True)
    log_q = GroupTargetBuilder()(torch.tensor([[1.0, 0.0, 0.0]]))
    loss = AlphaDivergenceLoss(TAU)
    value = loss(log_ratio, log_q, 0.6)
    assert value.dtype == torch.float64
    assert value.item() == loss(log_ratio.double(), log_q, 0.6).item()
    value.sum().backward()
    assert log_ratio.grad.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Target, policy, diagnostics


def test_target_is_the_softmax_of_population_z_scores():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.25, -0.5]])
    values = rewards[0].tolist()
    mean = sum(values) / 6
    std = math.sqrt(sum((r - mean) ** 2 for r in values) / 6)
    weights = [math.exp((r - mean) / (std + 1e-6) / 0.7) for r in values]
    log_q = GroupTargetBuilder(beta_r=0.7)(rewards)
    assert log_q.dtype == torch.float64
    torch.testing.assert_close(
        log_q, torch.tensor([[math.log(w / sum(weights)) for w in weights]], dtype=torch.float64)
    )


@pytest.mark.parametrize("size", [2, 3, 7, 8, 10, 49, 512])
@pytest.mark.parametrize("reward", [0.1, -1 / 3, 1e-9, 123456.789])
def test_equal_rewards_give_exactly_the_uniform_target(reward, size):
    for dtype in (torch.float32, torch.float64):
        log_q = GroupTargetBuilder(beta_r=1e-3)(torch.full((1, size), reward, dtype=dtype))
        assert torch.equal(log_q, anchored_log_policy(torch.zeros(1, size), TAU))
        assert torch.equal(AlphaDivergenceLoss().coefficients(torch.zeros(1, size), log_q, 0.6), torch.zeros(1, size))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_names_its_group(bad):
    rewards = torch.ones(4, 8)
    rewards[2, 5] = bad
    with pytest.raises(ValueError, match="rewards of group 2 must be finite"):
        GroupTargetBuilder()(rewards)


@pytest.mark.parametrize("shape", [(8,), (4, 1), (2, 2, 2)])
def test_groups_have_two_dimensions_and_two_completions(shape):
    with pytest.raises(ValueError, match=r"rewards must have shape \[G, P\]"):
        GroupTargetBuilder()(torch.zeros(shape))


def test_policy_is_the_softmax_of_scaled_log_ratios_and_ignores_a_common_shift():
    log_ratio = torch.tensor([[0.4, 0.0, -0.8]], dtype=torch.float64)
    p = anchored_log_policy(log_ratio, 0.8).exp()
    torch.testing.assert_close(p, torch.softmax(torch.tensor([[0.5, 0.0, -1.0]]).double(), dim=-1))
    torch.testing.assert_close(anchored_log_policy(log_ratio - 100.0, 0.8).exp(), p)


def test_entropy_and_ess_at_their_ends():
    log_p = torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-300, 1e-300]], dtype=torch.float64))
    torch.testing.assert_close(normalized_entropy(log_p), torch.tensor([1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(ess(log_p), torch.tensor([4.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(ess(log_p + 500.0), ess(log_p))
    one_hot = torch.tensor([[0.0, -800.0, -800.0]], dtype=torch.float64)
    assert (normalized_entropy(one_hot).item(), ess(one_hot).item()) == (0.0, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals, and the shape of the package

LOG_RATIO = torch.zeros(2, 4)
LOG_Q = torch.log_softmax(torch.zeros(2, 4), dim=-1)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: GroupTargetBuilder(beta_r=0.0), "beta_r"),
        (lambda: GroupTargetBuilder(beta_r=math.nan), "beta_r"),
        (lambda: GroupTargetBuilder(beta_r="1.0"), "beta_r"),
        (lambda: GroupTargetBuilder(eps=0.0), "eps"),
        (lambda: AlphaDivergenceLoss(tau_anc=0.0), "tau_anc"),
        (lambda: AlphaDivergenceLoss(tau_anc=math.inf), "tau_anc"),
        (lambda: AlphaDivergenceLoss(weight_clip=(0.0, 2.0)), "weight_clip w_min"),
        (lambda: AlphaDivergenceLoss(weight_clip=(1.5, 2.0)), "weight_clip w_min"),
        (lambda: AlphaDivergenceLoss(weight_clip=(0.5, 0.9)), "weight_clip w_max"),
        (lambda: AlphaDivergenceLoss(weight_clip=(1.0, 1.0)), "weight_clip"),
        (lambda: AlphaDivergenceLoss(weight_clip=(0.5, 1.0, 2.0)), "weight_clip"),
        (lambda: AlphaDivergenceLoss(weight_clip=2.0), "weight_clip"),
        (lambda: anchored_log_policy(LOG_RATIO, -1.0), "tau_anc"),
        (lambda: anchored_log_policy(LOG_RATIO + math.nan, 1.0), "log_ratio of group 0"),
        (lambda: alpha_divergence(LOG_Q, LOG_Q, 1.1), "alpha"),
        (lambda: alpha_divergence(LOG_Q, LOG_Q, math.nan), "alpha"),
        (lambda: alpha_divergence(LOG_Q, LOG_Q, torch.tensor([0.5, -0.5])), "alpha"),
        (lambda: alpha_divergence(LOG_Q, LOG_Q, torch.full((3,), 0.5)), "alpha"),
        (lambda: alpha_divergence(LOG_Q, LOG_Q[:, :3], 0.5), "log_q and log_p"),
        (lambda: AlphaDivergenceLoss().coefficients(LOG_RATIO, LOG_Q[:1], 0.5), "log_q and log_p"),
    ],
)
def test_a_bad_setting_is_refused_by_name(build, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        build()


def test_public_names():
    assert {
        "AlphaDivergenceLoss",
        "GroupTargetBuilder",
        "alpha_divergence",
        "anchored_log_policy",
        "ess",
        "normalized_entropy",
        "group_loss",
    } <= set(objectives.__all__)
    assert all(hasattr(objectives, name) for name in objectives.__all__)


def test_the_maths_needs_torch_only():
    """Beyond what torch itself brings, importing objectives and alpha loads the standard library and nothing else."""
    script = """
import sys, torch
before = set(sys.modules)
import openrlhf_apo.alpha, openrlhf_apo.objectives
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names) - {"torch"}))
print([name for name in ("ray", "vllm", "deepspeed", "transformers", "openrlhf") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['openrlhf_apo']", "[]"]
