"""What the objective does where it degenerates, and its relatives: the facts that DESIGN and the README build on.

P = 8 completions, tau = 0.8, beta_r = 1 unless a test says otherwise.
"""

import math

import pytest
import torch

from openrlhf_apo.alpha import AlphaSignals, EssAlpha, GuardedAlpha
from openrlhf_apo.objectives import (
    AlphaDivergenceLoss,
    GroupTargetBuilder,
    alpha_divergence,
    anchored_log_policy,
    ess,
    normalized_entropy,
)

P = 8
TAU = 0.8
LOSS = AlphaDivergenceLoss(TAU)
AT_ANCHOR = torch.zeros(1, P)
UNIFORM = anchored_log_policy(AT_ANCHOR, TAU)


def binary(correct):
    """rewards[1, P] with `correct` ones."""
    return torch.tensor([[1.0] * correct + [0.0] * (P - correct)])


def z_score(rewards):
    """The advantage A of Eq. 4, without epsilon."""
    rewards = rewards.double()
    return (rewards - rewards.mean(dim=-1, keepdim=True)) / rewards.std(dim=-1, correction=0, keepdim=True)


def random_log_probs(size=P, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(4, size, generator=generator, dtype=torch.float64), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# At the anchor, u = 0


def test_at_the_anchor_confidence_is_zero_and_the_guard_never_moves():
    torch.testing.assert_close(UNIFORM.exp(), torch.full((1, P), 1 / P, dtype=torch.float64))
    confidence = 1 - normalized_entropy(UNIFORM).item()
    assert confidence == pytest.approx(0.0, abs=1e-15)
    controller = GuardedAlpha()
    for step in range(200):  # rewards that rise all the time
        alpha = controller.step(AlphaSignals(mean_reward=step / 200, confidence=confidence))
        assert alpha == pytest.approx(controller.alpha_max, abs=1e-14)
    assert controller.metrics["improvement"] > 0.5


@pytest.mark.parametrize("alpha", [1e-4, 0.35, 0.6, 0.9, 1.0])
def test_at_the_anchor_the_gradient_is_a_warped_centred_advantage(alpha):
    log_q = GroupTargetBuilder()(torch.arange(P)[None])
    q_alpha = log_q.exp() ** alpha
    expected = P ** (alpha - 1) * (q_alpha - q_alpha.mean(dim=-1, keepdim=True)) / (alpha * TAU)
    gradient = LOSS.coefficients(AT_ANCHOR, log_q, alpha)
    torch.testing.assert_close(-gradient, expected, rtol=1e-9, atol=1e-12)
    assert gradient.norm() > 0.1


def test_as_alpha_falls_to_zero_the_gradient_becomes_the_z_score():
    """GRPO's advantage over the sequence sum, divided by P tau beta_r."""
    rewards, beta_r = torch.rand(3, P, generator=torch.Generator().manual_seed(0)), 0.7
    log_q = GroupTargetBuilder(beta_r, eps=1e-12)(rewards)
    expected = z_score(rewards) / (P * TAU * beta_r)
    at_anchor = torch.zeros(3, P)
    torch.testing.assert_close(-LOSS.coefficients(at_anchor, log_q, 0.0), expected, rtol=1e-9, atol=1e-12)
    gaps = [(-LOSS.coefficients(at_anchor, log_q, alpha) - expected).norm().item() for alpha in (1e-2, 1e-4, 1e-6)]
    assert gaps[1] == pytest.approx(gaps[0] / 100, rel=0.05)
    assert gaps[2] == pytest.approx(gaps[1] / 100, rel=0.05)


@pytest.mark.parametrize(
    ("alpha", "weights"),
    [
        (0.35, [1.153, 1.017, 0.938, 0.877, 0.818, 0.750, 0.645]),
        (0.6, [1.348, 1.063, 0.920, 0.818, 0.727, 0.631, 0.498]),
        (0.9, [1.714, 1.159, 0.924, 0.772, 0.649, 0.530, 0.385]),
    ],
)
def test_binary_rewards_at_the_anchor_make_alpha_a_weight_per_difficulty(alpha, weights):
    """-c is parallel to A; its length over that of z-score REINFORCE, for 1..7 correct of 8."""
    for correct, weight in enumerate(weights, start=1):
        gradient = -LOSS.coefficients(AT_ANCHOR, GroupTargetBuilder()(binary(correct)), alpha)
        advantage = z_score(binary(correct)) / (P * TAU)
        assert torch.cosine_similarity(gradient, advantage).item() == pytest.approx(1.0, abs=1e-12)
        assert (gradient.norm() / advantage.norm()).item() == pytest.approx(weight, abs=6e-4)


@pytest.mark.parametrize(("beta_r", "cosine"), [(1.0, 0.936), (0.3, 0.720)])
def test_graded_rewards_give_alpha_a_direction(beta_r, cosine):
    rewards = torch.arange(P)[None]  # eight evenly spaced levels
    gradient = -LOSS.coefficients(AT_ANCHOR, GroupTargetBuilder(beta_r)(rewards), 0.9)
    assert torch.cosine_similarity(gradient, z_score(rewards)).item() == pytest.approx(cosine, abs=6e-4)


def test_at_the_anchor_alpha_and_beta_r_are_one_knob_inside_a_group():
    """Equal alpha / beta_r: parallel, and the length is P^alpha / (alpha Z^alpha), Z = sum_j exp(A_j / beta_r)."""
    rewards = torch.rand(1, P, generator=torch.Generator().manual_seed(0))
    scaled = []
    for alpha, beta_r in ((0.3, 0.5), (0.6, 1.0), (0.9, 1.5)):
        log_q = GroupTargetBuilder(beta_r, eps=1e-12)(rewards)
        log_z = torch.logsumexp(z_score(rewards) / beta_r, dim=-1)
        weight = torch.exp(alpha * (math.log(P) - log_z)) / alpha
        scaled.append(LOSS.coefficients(AT_ANCHOR, log_q, alpha) / weight)
    torch.testing.assert_close(scaled[1], scaled[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(scaled[2], scaled[0], rtol=1e-9, atol=1e-12)


def test_off_the_anchor_alpha_has_a_direction_with_binary_rewards_too():
    log_ratio = torch.randn(1, P, generator=torch.Generator().manual_seed(0))
    log_q = GroupTargetBuilder()(binary(3))
    low, high = (LOSS.coefficients(log_ratio, log_q, alpha) for alpha in (0.35, 0.9))
    assert torch.cosine_similarity(low, high).item() < 0.99


# ---------------------------------------------------------------------------------------------------------------------
# Confidence is the variance of u


@pytest.mark.parametrize(("std", "tolerance"), [(1e-3, 1e-3), (1e-2, 1e-2), (0.1, 0.1)])
def test_confidence_is_var_u_over_two_log_p(std, tolerance):
    u = std * torch.randn(500, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    confidence = (1 - normalized_entropy(anchored_log_policy(u * TAU, TAU))).mean().item()
    predicted = (u.var(dim=-1, correction=0) / (2 * math.log(P))).mean().item()
    assert confidence == pytest.approx(predicted, rel=tolerance)


@pytest.mark.parametrize(
    ("std", "confidence"), [(0.01, 2.1e-5), (0.1, 2.1e-3), (0.3, 0.018), (1.0, 0.17), (2.0, 0.42)]
)
def test_confidence_needs_log_ratios_of_order_one(std, confidence):
    """Length-normalised log-ratios, of order 1e-3, leave the guard dead; sums over the sequence do not."""
    u = std * torch.randn(20_000, P, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = (1 - normalized_entropy(anchored_log_policy(u * TAU, TAU))).mean().item()
    assert measured == pytest.approx(confidence, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Zero-variance groups


def test_a_zero_variance_group_has_no_gradient_at_the_anchor_and_pulls_to_uniform_off_it():
    log_q = GroupTargetBuilder()(torch.full((1, P), 0.7))
    for alpha in (0.0, 0.35, 0.9, 1.0):
        assert torch.equal(LOSS.coefficients(AT_ANCHOR, log_q, alpha), torch.zeros(1, P))

        log_ratio = torch.linspace(-1, 1, P, dtype=torch.float64)[None]
        gradient = LOSS.coefficients(log_ratio, log_q, alpha)
        assert gradient[0, 0] < 0 < gradient[0, -1]  # raise the least likely, lower the most likely
        before, after = (anchored_log_policy(x, TAU) for x in (log_ratio, log_ratio - gradient))
        assert normalized_entropy(after) > normalized_entropy(before)


# ---------------------------------------------------------------------------------------------------------------------
# Effective sample size


def ess_step(log_q, log_p, **settings):
    controller = EssAlpha(rho=1.0, **settings)
    alpha = controller.step(AlphaSignals(mean_reward=0.0, confidence=0.0, log_q=log_q, log_p=log_p))
    return alpha, controller.metrics["ess_outcome"]


@pytest.mark.parametrize("weights", ["ratio", "geometric"])
@pytest.mark.parametrize(
    ("correct", "alpha", "outcome"),
    [(1, 0.585, "root"), (2, 0.808, "root"), *((k, 0.9, "clamped_hi") for k in range(3, 8))],
)
def test_ess_has_a_root_only_for_hard_prompts(correct, alpha, outcome, weights):
    """Binary rewards at the anchor, gamma = 0.5; the two weights coincide there."""
    found = ess_step(GroupTargetBuilder()(binary(correct)), UNIFORM, weights=weights)
    assert found == (pytest.approx(alpha, abs=6e-4), outcome)


def test_ess_never_falls_below_the_number_of_correct_answers():
    for correct in range(4, 8):  # k >= gamma P: no root at any alpha
        log_q = GroupTargetBuilder()(binary(correct))
        alpha = torch.tensor([0.5, 1.0, 5.0, 50.0])[:, None]
        sizes = ess(alpha * (log_q - UNIFORM))
        assert (sizes >= correct - 1e-9).all()
        assert sizes[-1].item() == pytest.approx(correct, abs=1e-9)


@pytest.mark.parametrize(("accuracy", "size"), [(0.2, 4.07), (0.4, 4.64), (0.6, 5.73), (0.8, 6.79)])
def test_batch_mean_ess_at_alpha_max_is_already_above_the_target(accuracy, size):
    """Averaged over all groups, as the published schedule does, ESS(0.9) > 4: "adaptive" would mean alpha_max."""
    mean = 0.0
    for correct in range(P + 1):
        probability = math.comb(P, correct) * accuracy**correct * (1 - accuracy) ** (P - correct)
        mean += probability * ess(0.9 * (GroupTargetBuilder()(binary(correct)) - UNIFORM)).item()
    assert mean == pytest.approx(size, abs=6e-3)


def test_ess_of_ratio_weights_falls_with_alpha():
    alpha = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None, None]
    for seed in range(20):
        log_r = random_log_probs(seed=seed, scale=2.0) - random_log_probs(seed=100 + seed, scale=2.0)
        assert (ess(alpha * log_r).diff(dim=0) < 1e-12).all()


def test_ess_of_geometric_weights_may_rise_and_fall():
    log_q = torch.log_softmax(torch.tensor([4.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64), dim=-1)
    log_p = log_q.flip(0)
    sizes = [ess(alpha * log_q + (1 - alpha) * log_p).item() for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sizes == pytest.approx([1.15, 1.61, 2.82, 1.61, 1.15], abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Relatives and limits


@pytest.mark.parametrize("alpha", [0.05, 0.35, 0.5, 0.6, 0.9, 0.95])
def test_divergence_is_the_loss_of_f_po(alpha):
    """arXiv 2410.21662: 1 / (alpha (alpha-1)) sum_i q (u^(1-alpha) - (1-alpha) u - alpha), u = p/q."""
    log_q, log_p = random_log_probs(seed=0), random_log_probs(seed=1)
    q, u = log_q.exp(), (log_p - log_q).exp()
    f_po = (q * (u ** (1 - alpha) - (1 - alpha) * u - alpha)).sum(dim=-1) / (alpha * (alpha - 1))
    torch.testing.assert_close(alpha_divergence(log_q, log_p, alpha), f_po, rtol=1e-10, atol=0)


def test_the_ends_are_the_two_kl_divergences():
    log_q, log_p = random_log_probs(seed=0), random_log_probs(seed=1)
    forward = (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    reverse = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    torch.testing.assert_close(alpha_divergence(log_q, log_p, 1.0), forward, rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha_divergence(log_q, log_p, 0.0), reverse, rtol=1e-12, atol=0)
    torch.testing.assert_close(alpha_divergence(log_q, log_p, 1 - 1e-9), forward, rtol=1e-7, atol=0)
    torch.testing.assert_close(alpha_divergence(log_q, log_p, 1e-9), reverse, rtol=1e-7, atol=0)


def test_alpha_and_one_minus_alpha_swap_the_arguments():
    log_q, log_p = random_log_probs(seed=0), random_log_probs(seed=1)
    torch.testing.assert_close(
        alpha_divergence(log_q, log_p, 0.3), alpha_divergence(log_p, log_q, 0.7), rtol=1e-13, atol=0
    )


def test_forward_kl_is_the_cross_entropy_of_infonca_and_adpo():
    """alpha = 1: -sum q log p up to the entropy of q, so (p - q) / tau is its gradient."""
    log_ratio, log_q = torch.randn(3, P, generator=torch.Generator().manual_seed(0)), random_log_probs()[:3]
    p = anchored_log_policy(log_ratio, TAU).exp()
    torch.testing.assert_close(LOSS.coefficients(log_ratio, log_q, 1.0), (p - log_q.exp()) / TAU)
