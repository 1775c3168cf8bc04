"""Token objectives beside their formulas: OpenRLHF's own loss, clip boundaries, alpha-PPO's divergence, BAPO's bounds,
GTPO's conflicts and memory, G2RPO-A's guidance, ADRPO's coefficients."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from test_token_losses import BAPO, LN2, Case, bapo_bounds, evaluate, in_conflict, make_case, z_scores

from openrlhf_apo.objectives import TOKEN_LOSSES, Adrpo, Guidance, alpha_divergence
from openrlhf_apo.objectives.gtpo import conflict_tokens
from openrlhf_apo.objectives.kl import approximate_kl

# ---------------------------------------------------------------------------------------------------------------------
# OpenRLHF's PolicyLoss, float32. In a process of its own: it needs the patches of cpu.install.

OPENRLHF = """
import sys
import torch
from openrlhf_apo import cpu
cpu.install()
from openrlhf.models.loss import PolicyLoss
job = torch.load(sys.argv[1])
results = []
for settings in job["settings"]:
    log_probs = job["new"].clone().requires_grad_()
    loss, clipped, *_ = PolicyLoss(**settings)(
        log_probs, job["old"], job["advantages"], job["mask"],
        batch_num_tokens=job["mask"].sum().item(), global_batch_size=len(log_probs),
    )
    loss.backward()
    results.append((loss.item(), log_probs.grad[job["mask"] > 0], clipped.item()))
torch.save(results, sys.argv[1])
"""
PAIRS = [  # name, ours, PolicyLoss's settings
    ("dapo", {}, {"clip_eps_low": 0.2, "clip_eps_high": 0.28}),
    ("dapo", {"dual_clip": 1.6}, {"clip_eps_low": 0.2, "clip_eps_high": 0.28, "dual_clip": 1.6}),
    ("grpo", {"eps_high": 0.3}, {"clip_eps_low": 0.2, "clip_eps_high": 0.3, "token_level_loss": False}),
    ("grpo", {"dual_clip": 3.0}, {"dual_clip": 3.0, "token_level_loss": False}),
    ("gspo", {}, {"clip_eps_low": 3e-4, "clip_eps_high": 4e-4, "policy_loss_type": "gspo"}),
    (
        "gspo",
        {"eps_low": 0.1, "eps_high": 0.2, "dual_clip": 1.3},
        {"clip_eps_low": 0.1, "clip_eps_high": 0.2, "dual_clip": 1.3, "policy_loss_type": "gspo"},
    ),
]


def pad(rows, filler=0.0):
    rows = [torch.tensor(row, dtype=torch.float64).float() for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)


def test_value_gradient_and_clip_fraction_are_openrlhf_s(tmp_path):
    case = make_case("random", seed=3, groups=8)
    new, old, mask = pad(case.new), pad(case.old), pad([[1.0] * n for n in case.lengths])
    advantages = torch.tensor(z_scores(case)).view(-1, 1)
    job = {"settings": [theirs for *_, theirs in PAIRS], "new": new, "old": old, "mask": mask}
    torch.save(job | {"advantages": advantages.expand_as(new)}, tmp_path / "job.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", OPENRLHF, str(tmp_path / "job.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "job.pt")
    for (name, settings, _), (value, gradient, clip_fraction) in zip(PAIRS, results, strict=True):
        ours, our_gradient = evaluate(TOKEN_LOSSES[name](**settings), case, torch.float32)
        assert ours == pytest.approx(value, rel=1e-6)
        assert (our_gradient - gradient).norm() <= 1e-6 * gradient.norm()
        if "dual_clip" not in settings:  # OpenRLHF does not count those
            _, clipped = TOKEN_LOSSES[name](**settings).per_token(new, old, advantages, mask)
            assert (clipped * mask).sum() / mask.sum() == pytest.approx(clip_fraction, rel=1e-6)
            assert 0 < clip_fraction < 1


# ---------------------------------------------------------------------------------------------------------------------
# Clip boundaries, and the settings of the papers.


@pytest.mark.parametrize("offset", [-1e-9, 0.0, 1e-9])
@pytest.mark.parametrize("x", [-0.25, 0.25])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "bapo"])
def test_the_gradient_stops_just_beyond_the_bound_and_only_on_the_side_of_the_advantage(name, x, offset):
    """Two answers of one token, of advantage + and -, both at log-ratio x + offset, with bounds at exp(+-0.25)."""
    low, high = (torch.full((2, 1), b, dtype=torch.float64).exp()[0, 0].item() for b in (-0.25, 0.25))
    if name == "bapo":
        loss = TOKEN_LOSSES[name](low_range=(low, low), high_range=(high, high))
    else:
        loss = TOKEN_LOSSES[name](eps_low=1 - low, eps_high=high - 1)  # exact: 1 + (high - 1) == high
    case = Case([[1.0, 0.0]], [[0], [1]], old=[[-1.0]] * 2, new=[[-1.0 + x + offset]] * 2, entropies=[0.0] * 2)
    _, gradient = evaluate(loss, case)
    stopped = [x > 0 and offset > 0, x < 0 and offset < 0]
    assert (gradient == 0).tolist() == stopped
    terms = loss.terms(case.step())
    old = torch.full((2, 1), -1.0, dtype=torch.float64)
    _, clipped = terms.loss.per_token(
        old + (x + offset), old, terms.columns["advantage"].view(2, 1), torch.ones_like(old)
    )
    assert clipped.flatten().tolist() == stopped


def test_defaults_are_the_papers():
    bounds = {
        name: (loss.eps_low, loss.eps_high) for name, c in TOKEN_LOSSES.items() if hasattr(loss := c(), "eps_low")
    }
    assert bounds == {
        **dict.fromkeys(("grpo", "dr_grpo", "g2rpo_a"), (0.2, 0.2)),
        **{"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# alpha-PPO.


def divergence_per_token(log_ratio, alpha):
    log_ratio = torch.as_tensor(log_ratio, dtype=torch.float64).view(1, -1)
    nothing = torch.zeros_like(log_ratio)
    return TOKEN_LOSSES["alpha_ppo"](alpha=alpha).per_token(log_ratio, nothing, nothing, nothing + 1)[0]


@pytest.mark.parametrize("alpha", [1e-7, 0.01, 0.35, 0.5, 0.9, 0.999, 1 - 1e-7])
def test_the_mean_of_alpha_ppo_s_term_is_the_alpha_divergence(alpha):
    for seed in range(5):
        log_old, log_new = torch.randn(
            2, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        ).log_softmax(-1)
        old, new = log_old.exp()[0], log_new.exp()[0]
        mean = (old * divergence_per_token(log_new - log_old, alpha)).sum()
        torch.testing.assert_close(mean, alpha_divergence(log_old, log_new, alpha)[0], rtol=1e-7, atol=1e-12)
        if alpha < 1e-6:  # KL(pi_theta || pi_old)
            torch.testing.assert_close(mean, (new * (new / old).log()).sum(), rtol=1e-6, atol=0)
        elif alpha > 1 - 1e-6:
            torch.testing.assert_close(mean, (old * (old / new).log()).sum(), rtol=1e-6, atol=0)
        else:
            closed = (1 - (old**alpha * new ** (1 - alpha)).sum()) / (alpha * (1 - alpha))
            torch.testing.assert_close(mean, closed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.01, 0.35, 0.5, 0.9, 0.999])
def test_alpha_ppo_s_term_is_positive_and_flat_only_at_ratio_one(alpha):
    x = torch.linspace(-30, 30, 61, dtype=torch.float64).requires_grad_()  # 30 is 0
    d = divergence_per_token(x, alpha).flatten()
    (gradient,) = torch.autograd.grad(d.sum(), x)
    assert d[30] == 0 and gradient[30] == 0
    others = [*range(30), *range(31, 61)]
    assert (d[others] > 0).all() and d.isfinite().all() and gradient.isfinite().all()
    assert (gradient[11:30] < 0).all() and (gradient[31:50] > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# BAPO.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rho", [0.3, 0.5, 0.55, 0.9])
def test_bapo_takes_the_first_bounds_that_give_positive_samples_their_share(rho, seed):
    rng = random.Random(seed)
    r = [math.exp(rng.gauss(0, 0.7)) for _ in range(200)]
    a = [rng.choice([-1.0, 0.0, rng.uniform(0.6, 1.6)]) for _ in r]
    settings = BAPO | {"rho": rho}
    bounds, share = TOKEN_LOSSES["bapo"](**settings).balance(torch.tensor(r), torch.tensor(a))
    assert bounds == pytest.approx(bapo_bounds(r, a, **settings), abs=1e-6)
    assert (share >= rho) or bounds == (0.9, 3.0)


@pytest.mark.parametrize(
    ("advantages", "bounds", "share"),
    [([1.0, 2.0], (0.6, 1.2), 1.0), ([0.0, 0.0], (0.6, 1.2), 1.0), ([-1.0, -2.0], (0.9, 3.0), 0.0)],
)
def test_bapo_with_advantages_of_one_sign(advantages, bounds, share):
    assert TOKEN_LOSSES["bapo"]().balance(torch.ones(2), torch.tensor(advantages)) == (bounds, share)


def test_bapo_keeps_its_ranges_and_starts_anew_at_every_step():
    loss, hard = TOKEN_LOSSES["bapo"](rho=0.99), make_case("random")
    first, second = loss.terms(hard.step()), loss.terms(make_case("equal").step())
    assert first.loss.bounds == (0.9, 3.0) and second.loss.bounds == (0.6, 1.2) and loss.bounds is None
    assert (
        first.metrics["clip_low"] == 0.9
        and first.metrics["clip_high"] == 3.0
        and 0 < first.metrics["positive_share"] < 1
    )


@pytest.mark.parametrize(
    "ranges", [((0.0, 0.9), (1.2, 3.0)), ((0.9, 0.6), (1.2, 3.0)), ((0.6, 1.1), (1.2, 3.0)), ((0.6, 0.9), (3.0, 1.2))]
)
def test_bapo_refuses_ranges_that_do_not_hold_one_between_them(ranges):
    with pytest.raises(ValueError, match="low_max < 1 < high"):
        TOKEN_LOSSES["bapo"](low_range=ranges[0], high_range=ranges[1])


# ---------------------------------------------------------------------------------------------------------------------
# GTPO.


def test_conflict_tokens_of_all_short_answers():
    answers = [list(tokens) for n in range(1, 4) for tokens in product((0, 1), repeat=n)]
    for answer, one, other in product(answers, answers, [None, *answers]):
        rivals = [one] if other is None else [one, other]
        assert conflict_tokens(answer, rivals) == [in_conflict(answer, rivals, t) for t in range(len(answer))]


@pytest.mark.parametrize(
    ("answer", "rivals", "expected"),
    [
        ([7, 1, 2, 9], [[7, 3, 9]], "x..x"),  # both ends
        ([7, 1, 2, 9], [[3, 1, 2, 8]], "...."),  # the middle is in no run
        ([1, 2, 3], [[1, 5, 5], [5, 2, 6]], "xx."),  # a run may go from rival to rival
        ([1, 2], [[0, 1, 2]], "xx"),  # counted from the end
        ([1, 2, 3], [[1]], "x.."),
        ([1, 2, 3], [], "..."),
    ],
)
def test_conflict_tokens_by_hand(answer, rivals, expected):
    assert "".join(".x"[c] for c in conflict_tokens(answer, rivals)) == expected


def test_gtpo_counts_conflicts_and_remembers_the_entropy_it_began_with():
    case = make_case("random")
    loss = TOKEN_LOSSES["gtpo"]()
    terms = loss.terms(case.step())
    conflicts = sum(f != 1.0 for row in terms.token_weights for f in row)
    assert terms.metrics["conflict_fraction"] == pytest.approx(conflicts / sum(case.lengths)) and conflicts > 0
    assert loss.initial_entropy == pytest.approx(statistics.mean(case.entropies))
    case.entropies = [5.0] * len(case.entropies)
    loss.terms(case.step())
    resumed = TOKEN_LOSSES["gtpo"]()
    resumed.load_state_dict(json.loads(json.dumps(loss.state_dict())))
    assert resumed.initial_entropy == loss.initial_entropy == pytest.approx(terms.loss.initial_entropy)
    assert torch.equal(resumed.terms(case.step()).columns["advantage"], loss.terms(case.step()).columns["advantage"])


@pytest.mark.parametrize(("initial", "dropped"), [(LN2 - 1e-9, True), (LN2, False), (2.0, False)])
def test_gtpo_drops_answers_of_high_entropy_if_the_run_began_with_low(initial, dropped):
    case = make_case("random")
    advantages = TOKEN_LOSSES["gtpo"](initial_entropy=initial).terms(case.step()).columns["advantage"]
    high = torch.tensor(case.entropies) > LN2
    assert (advantages[high] == 0).all() == dropped and (advantages[~high] != 0).all() and high.any()


# ---------------------------------------------------------------------------------------------------------------------
# G2RPO-A and ADRPO.


def after(guidance, *accuracies):
    for accuracy in accuracies:
        guidance.step(accuracy)
    return guidance.tokens


@pytest.mark.parametrize(
    ("start", "accuracies", "expected"),
    [
        (100, (0.4, 0.6), 100),  # not before the third rollout
        (100, (0.4, 0.6, 1.0), 50),  # rose: 100 * 0.5 / 1.0
        (101, (0.4, 0.6, 1.0), 50),  # floor
        (1, (0.25, 0.25, 1.0), 1),  # at least one
        (100, (0.5, 0.5, 0.25), 100),  # fell, at its maximum
        (100, (0.25, 0.25, 0.5, 0.5, 0.5, 0.25), 100),  # 50, then back up
        (100, (0.25, 0.25, 1.0, 0.5, 0.5, 0.25), 50),  # 25, then 25 * 0.5 / 0.25
        (100, (0.25, 0.25, 0.5, 0.125), 50),  # the next cycle has begun, nothing more
        (7, (1 / 12, 1 / 12, 1 / 12), 7),  # unchanged, where 7 * (1/12) / (1/12) rounds to less than 7
        (100, (0.5, 0.5, 0.0), 100),
        (100, (0.0, 0.0, 0.5), 100),
    ],
)
def test_guidance_follows_accuracy(start, accuracies, expected):
    assert after(Guidance(length=start), *accuracies) == expected


def test_guidance_resumes_anywhere():
    rng = random.Random(0)
    accuracies = [rng.randint(1, 15) / 16 for _ in range(20)]
    whole = [after(guidance, a) for guidance in [Guidance(length=500)] for a in accuracies]
    assert len(set(whole)) > 4 and max(whole) <= 500
    for cut in range(20):
        resumed, first = Guidance(length=500), Guidance(length=500)
        after(first, *accuracies[:cut])
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert [after(resumed, a) for a in accuracies[cut:]] == whole[cut:]


def test_guidance_hides_the_end_of_a_solution_and_guides_a_share_of_the_group():
    solution = list(range(10))
    assert Guidance(length=3).prefix(solution) == [0, 1, 2]
    assert Guidance(length=3072).prefix(solution) == list(range(8))
    assert Guidance().prefix([5]) == []
    assert [Guidance().guided(size) for size in (2, 6, 8, 12)] == [1, 1, 1, 2]
    assert Guidance(share=0.9).guided(4) == 3  # one answer is always the policy's own


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.5, 0.5), (-100.0, 100.0), (0.04, 0.04)])
def test_adrpo_pulls_by_what_an_answer_lacks(low, high):
    case = make_case("random")
    betas = Adrpo(beta_0=0.04, beta_min=low, beta_max=high).betas(case.step().rewards).flatten().tolist()
    assert betas == pytest.approx([min(max(0.04 - a, low), high) for a in z_scores(case)], abs=1e-12)
    assert (min(betas) < 0) == (low < 0)


def test_adrpo_of_equal_rewards_is_beta_0():
    assert (Adrpo().betas(make_case("equal").step().rewards) == 0.04).all()
    with pytest.raises(ValueError, match="beta_min must not be above beta_max"):
        Adrpo(beta_min=2.0)


# ---------------------------------------------------------------------------------------------------------------------
# KL to the reference, token by token.


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_and_their_gradients_are_openrlhfs(estimator, tmp_path):
    x = torch.tensor([-30.0, -10.5, -2.7, -2.6, -1.0, -1e-4, 0.0, 1e-4, 1.0, 4.0, 12.0])
    code = (
        "from openrlhf_apo import cpu; cpu.install_for_ranks()\n"
        "import torch; from openrlhf.models.utils import compute_approx_kl\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r}).requires_grad_()\n"
        f"kl = compute_approx_kl(x, torch.zeros_like(x), kl_estimator={estimator!r})\n"
        f"torch.save((kl.detach(), torch.autograd.grad(kl.sum(), x)[0]), {str(tmp_path / 'kl.pt')!r})\n"
    )
    torch.save(x, tmp_path / "x.pt")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    theirs, their_gradient = torch.load(tmp_path / "kl.pt")
    x.requires_grad_()
    ours = approximate_kl(x, torch.zeros_like(x), estimator)
    (gradient,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-6, atol=1e-7)
    if estimator == "k3":
        assert (gradient[x < -2.62] == 0).all() and gradient[3] != 0  # capped at 10
