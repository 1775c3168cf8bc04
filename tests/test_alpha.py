"""The alpha controllers: formulas, bounds, refusals, and that a resumed one continues exactly."""

import json
import math
import random

import pytest
import torch

from openrlhf_apo.alpha import AlphaSignals, EssAlpha, FixedAlpha, GuardedAlpha, build_alpha_controller
from openrlhf_apo.objectives import GroupTargetBuilder, anchored_log_policy, ess

P = 8


def signals(reward=0.5, confidence=0.2, log_q=None, log_p=None):
    return AlphaSignals(mean_reward=reward, confidence=confidence, log_q=log_q, log_p=log_p)


def random_signals(seed, groups=6, uniform=()):
    """Graded rewards and a policy off its anchor; the groups in `uniform` have equal rewards."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups, P, generator=generator)
    rewards[list(uniform)] = 0.1
    log_ratio = torch.randn(groups, P, generator=generator)
    draw = random.Random(seed)
    log_q, log_p = GroupTargetBuilder(beta_r=0.5)(rewards), anchored_log_policy(log_ratio, 0.8)
    return signals(draw.random(), draw.random(), log_q, log_p)


def mean_ess_fraction(alpha, given, weights, groups=slice(None)):
    log_q, log_p = given.log_q[groups], given.log_p[groups]
    log_weights = alpha * (log_q - log_p) if weights == "ratio" else alpha * log_q + (1 - alpha) * log_p
    return ess(log_weights).mean().item() / P


# ---------------------------------------------------------------------------------------------------------------------
# fixed


def test_fixed_alpha_is_fixed():
    controller = FixedAlpha()
    assert [controller.step(signals(reward)) for reward in (0.0, 1.0)] == [0.6, 0.6]
    assert controller.metrics == {"alpha": 0.6}
    assert [FixedAlpha(end).step(signals()) for end in (0.0, 1.0)] == [0.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# guarded


def test_guarded_alpha_by_hand():
    controller = GuardedAlpha(rho=0.5, reward_scale_mode="fixed", baseline_init="paper")
    improvement = math.tanh(0.4 / 0.5)
    target = 0.9 - 0.55 * 0.3 * improvement
    assert controller.step(signals(0.4, 0.3)) == pytest.approx((0.9 + target) / 2, rel=1e-14)
    assert controller.metrics == {
        "alpha": pytest.approx((0.9 + target) / 2),
        "confidence": 0.3,
        "improvement": improvement,
        "reward_baseline": 0.0,
        "reward_scale": 0.5,
    }
    controller.step(signals(0.2, 0.3))
    assert controller.metrics["reward_baseline"] == pytest.approx(0.04)
    assert controller.metrics["improvement"] == pytest.approx(math.tanh(0.16 / 0.5))


def test_only_the_paper_baseline_invents_an_improvement_at_the_first_step():
    invented = {}
    for init in ("first", "paper"):
        controller = GuardedAlpha(baseline_init=init)
        controller.step(signals(0.4, 1.0))
        invented[init] = controller.metrics["improvement"]
    assert invented == {"first": 0.0, "paper": pytest.approx(0.66, abs=0.01)}


def test_alpha_falls_only_when_confidence_and_reward_rise():
    for rewards, confidence in [([0.5, 0.4, 0.3], 1.0), ([0.1, 0.5, 0.9], 0.0)]:
        controller = GuardedAlpha(rho=1.0)
        assert [controller.step(signals(r, confidence)) for r in rewards] == [0.9] * 3
    controller = GuardedAlpha(rho=1.0)
    assert [controller.step(signals(r, 1.0)) for r in (0.1, 0.5, 0.9)][-1] < 0.5


def test_the_floor_is_reached_and_never_crossed():
    controller = GuardedAlpha(rho=1.0, lam=0.01, reward_scale=1e-3, reward_scale_mode="fixed")
    alphas = [controller.step(signals(float(t), 1.0 + 1e-7)) for t in range(5)]
    assert alphas[0] == 0.9
    assert alphas[1:] == [pytest.approx(0.35, abs=1e-15)] * 4


def test_running_scale_follows_the_spread_of_the_rewards_and_survives_constant_ones():
    draw = random.Random(0)
    controller = GuardedAlpha()
    for _ in range(2000):
        controller.step(signals(draw.gauss(0.3, 0.05)))
    assert controller.metrics["reward_scale"] == pytest.approx(0.05, rel=0.5)
    for _ in range(2000):
        controller.step(signals(0.3))
    assert 0 < controller.metrics["reward_scale"] <= 1e-8
    assert controller.step(signals(0.3, 1.0)) <= 0.9  # no division by zero

    controller = GuardedAlpha()
    scales = []
    for reward in (0.2, 0.6):
        controller.step(signals(reward))
        scales.append(controller.metrics["reward_scale"])
    controller.step(signals(0.6))
    assert scales == [0.5, pytest.approx(0.5 * math.sqrt(0.9))]
    assert controller.metrics["reward_scale"] == pytest.approx(math.sqrt(0.9 * (0.9 * 0.25 + 0.1 * 0.4**2)))


# ---------------------------------------------------------------------------------------------------------------------
# ess


@pytest.mark.parametrize("weights", ["ratio", "geometric"])
@pytest.mark.parametrize("seed", range(5))
def test_a_root_hits_the_target(seed, weights):
    given = random_signals(seed)
    gamma = 0.5 * (mean_ess_fraction(0.9, given, weights) + mean_ess_fraction(0.35, given, weights))
    controller = EssAlpha(gamma=gamma, weights=weights, rho=1.0)
    alpha = controller.step(given)
    assert isinstance(alpha, float) and 0.35 < alpha < 0.9
    assert mean_ess_fraction(alpha, given, weights) == pytest.approx(gamma, abs=1e-12)
    assert controller.metrics == {"alpha": alpha, "ess": pytest.approx(gamma, abs=1e-12), "ess_outcome": "root"}


@pytest.mark.parametrize(("gamma", "alpha", "outcome"), [(0.13, 0.9, "clamped_hi"), (0.99, 0.35, "clamped_lo")])
@pytest.mark.parametrize("weights", ["ratio", "geometric"])
def test_without_a_root_alpha_is_clamped(gamma, alpha, outcome, weights):
    controller = EssAlpha(gamma=gamma, weights=weights, rho=1.0)
    given = random_signals(0)
    assert controller.step(given) == alpha
    assert controller.metrics["ess_outcome"] == outcome
    assert controller.metrics["ess"] == pytest.approx(mean_ess_fraction(alpha, given, weights))


def test_geometric_weights_take_the_root_nearest_alpha_max():
    """ESS rises to 2.8 of 5 at alpha = 0.5 and falls on both sides: two roots, and a low ESS at both ends."""
    log_q = torch.log_softmax(torch.tensor([[4.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64), dim=-1)
    given = signals(log_q=log_q, log_p=log_q.flip(1))
    controller = EssAlpha(alpha_max=0.9, alpha_min=0.1, gamma=0.4, weights="geometric", rho=1.0)
    alpha = controller.step(given)
    assert controller.metrics["ess_outcome"] == "root"
    assert controller.metrics["ess"] == pytest.approx(0.4, abs=1e-12)
    assert 0.5 < alpha < 0.9


def test_zero_variance_groups_do_not_count():
    mixed = random_signals(1, groups=6, uniform=(0, 3))
    kept = torch.tensor([1, 2, 4, 5])
    alone = signals(log_q=mixed.log_q[kept], log_p=mixed.log_p[kept])
    gamma = mean_ess_fraction(0.6, alone, "ratio")
    with_them, without_them = EssAlpha(gamma=gamma, rho=1.0), EssAlpha(gamma=gamma, rho=1.0)
    assert with_them.step(mixed) == without_them.step(alone) == pytest.approx(0.6, abs=1e-12)
    assert with_them.metrics == without_them.metrics


def test_a_batch_of_zero_variance_groups_keeps_alpha():
    controller = EssAlpha(gamma=0.99)
    before = controller.step(random_signals(0))
    assert before == pytest.approx(0.9 - 0.1 * 0.55)  # one smoothed step from alpha_max towards alpha_min
    assert controller.step(random_signals(1, groups=2, uniform=(0, 1))) == before
    assert controller.metrics == {"alpha": before, "ess_outcome": "skipped"}


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_a_batch_whose_groups_were_all_dropped_keeps_alpha(scope):
    controller = EssAlpha(scope=scope)
    controller.step(signals(log_q=torch.zeros(0, P), log_p=torch.zeros(0, P)))
    assert controller.metrics["alpha"] == 0.9
    assert controller.state_dict() == {"alpha": 0.9}


@pytest.mark.parametrize("weights", ["ratio", "geometric"])
def test_group_scope_solves_each_group_as_if_alone(weights):
    given = random_signals(2, groups=12, uniform=(3, 7))
    controller = EssAlpha(gamma=0.4, weights=weights, scope="group", rho=1.0)
    alpha = controller.step(given)
    outcomes = []
    for g in range(12):
        alone = EssAlpha(gamma=0.4, weights=weights, rho=1.0)
        row = slice(g, g + 1)
        assert alpha[g].item() == pytest.approx(alone.step(signals(log_q=given.log_q[row], log_p=given.log_p[row])))
        outcomes.append(alone.metrics["ess_outcome"])
    assert alpha[3] == alpha[7] == 0.9  # the previous alpha
    assert len(set(outcomes)) >= 3
    names = ("root", "clamped_hi", "clamped_lo", "skipped")
    assert controller.metrics["ess_outcome"] == {name: outcomes.count(name) for name in names}
    assert controller.metrics["alpha"] == pytest.approx(alpha.mean().item())


def test_group_scope_is_smoothed_from_the_last_mean():
    given = random_signals(2, groups=12, uniform=(3,))
    exact = EssAlpha(scope="group", rho=1.0).step(given)
    controller = EssAlpha(scope="group", rho=0.1)
    first = controller.step(given)
    torch.testing.assert_close(first, 0.9 + 0.1 * (exact - 0.9))
    second = controller.step(given)
    expected = first.mean() + 0.1 * (exact - first.mean())
    expected[3] = first.mean()
    torch.testing.assert_close(second, expected)


def test_ess_needs_the_groups_and_a_reachable_target():
    with pytest.raises(ValueError, match="log_q and log_p"):
        EssAlpha().step(signals())
    with pytest.raises(ValueError, match="gamma must exceed 1/P"):
        EssAlpha(gamma=0.125).step(random_signals(0))


# ---------------------------------------------------------------------------------------------------------------------
# All of them

SETTINGS = [
    ("fixed", {}),
    ("guarded", {}),
    ("guarded", {"baseline_init": "paper", "reward_scale_mode": "fixed", "rho": 1.0}),
    ("ess", {"gamma": 0.6}),
    ("ess", {"gamma": 0.6, "weights": "geometric", "scope": "group"}),
]


@pytest.mark.parametrize(("mode", "settings"), SETTINGS)
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_controller_continues_exactly(mode, settings, stop):
    batches = [random_signals(seed, uniform=(0,)) for seed in range(15)]

    def run(controller, batches):
        log = []
        for batch in batches:
            alpha = controller.step(batch)
            log.append((alpha if isinstance(alpha, float) else alpha.tolist(), controller.metrics))
        return log

    whole = run(build_alpha_controller(mode, **settings), batches)
    first = build_alpha_controller(mode, **settings)
    log = run(first, batches[:stop])
    resumed = build_alpha_controller(mode, **settings)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert log + run(resumed, batches[stop:]) == whole
    json.dumps(whole, allow_nan=False)


@pytest.mark.parametrize(("mode", "settings"), SETTINGS[1:])
def test_alpha_stays_within_its_bounds(mode, settings):
    controller = build_alpha_controller(mode, alpha_max=0.7, alpha_min=0.4, **settings)
    for seed in range(30):
        alpha = torch.as_tensor(controller.step(random_signals(seed)))
        assert ((alpha >= 0.4) & (alpha <= 0.7)).all()


def test_a_saved_state_is_a_copy():
    controller = GuardedAlpha()
    saved = controller.state_dict()
    controller.step(signals(1.0))
    assert saved == GuardedAlpha().state_dict() != controller.state_dict()


def test_the_state_of_another_mode_is_refused():
    with pytest.raises(ValueError, match="alpha_mode that wrote the checkpoint"):
        EssAlpha().load_state_dict(GuardedAlpha().state_dict())


def test_build_gives_the_controller_of_each_mode():
    for mode, kind in [("fixed", FixedAlpha), ("guarded", GuardedAlpha), ("ess", EssAlpha)]:
        assert type(build_alpha_controller(mode)) is kind
    assert build_alpha_controller("guarded", lam=0.2).lam == 0.2


@pytest.mark.parametrize(
    ("mode", "settings", "field"),
    [
        ("adaptive", {}, "alpha_mode"),
        ("fixed", {"gamma": 0.5}, "gamma is not a setting of alpha_mode 'fixed'"),
        ("guarded", {"scope": "batch"}, "scope"),
        ("fixed", {"alpha": 1.5}, "alpha"),
        ("fixed", {"alpha": math.nan}, "alpha"),
        ("guarded", {"alpha_max": 1.0}, "alpha_max"),
        ("guarded", {"alpha_min": 0.0}, "alpha_min"),
        ("guarded", {"alpha_min": 0.9}, "alpha_min"),
        ("guarded", {"alpha_min": 0.6, "alpha_max": 0.5}, "alpha_min"),
        ("guarded", {"rho": 0.0}, "rho"),
        ("guarded", {"rho": None}, "rho"),
        ("guarded", {"rho": "0.1"}, "rho"),
        ("guarded", {"lam": 1.0}, "lam"),
        ("guarded", {"reward_scale": 0.0}, "reward_scale"),
        ("guarded", {"reward_scale_mode": "welford"}, "reward_scale_mode"),
        ("guarded", {"baseline_init": "zero"}, "baseline_init"),
        ("ess", {"alpha_min": 0.95}, "alpha_min"),
        ("ess", {"gamma": 1.0}, "gamma"),
        ("ess", {"gamma": 0.0}, "gamma"),
        ("ess", {"rho": 1.1}, "rho"),
        ("ess", {"weights": "uniform"}, "weights"),
        ("ess", {"scope": "token"}, "scope"),
    ],
)
def test_a_bad_setting_is_refused_by_name(mode, settings, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        build_alpha_controller(mode, **settings)


@pytest.mark.parametrize("field", ["mean_reward", "confidence"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None, torch.tensor(0.5)])
def test_signals_are_finite_numbers(field, value):
    with pytest.raises(ValueError, match=f"^{field}"):
        AlphaSignals(**{"mean_reward": 0.5, "confidence": 0.5, field: value})
