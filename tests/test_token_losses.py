"""Token and sequence objectives against their formulas, looped over samples and tokens one at a time in float64, and
under any micro-batching, order and padding. What is particular to one of them: test_token_loss_parts.py."""

import math
import random
import statistics
from dataclasses import dataclass

import pytest
import torch

from openrlhf_apo.objectives import TOKEN_LOSSES, TokenStep

LN2 = math.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# The cases: G groups of P answers of uneven length, as numbers.


@dataclass
class Case:
    rewards: list[list[float]]  # [G][P]
    ids: list[list[int]]  # [N][T], three different tokens, so that answers agree on many
    old: list[list[float]]  # [N][T] log pi_old
    new: list[list[float]]  # [N][T] log pi_theta
    entropies: list[float]  # [N], some below ln 2 and some above
    max_length: int = 16

    @property
    def lengths(self):
        return [len(row) for row in self.ids]

    def step(self) -> TokenStep:
        shape = (len(self.rewards), -1)
        return TokenStep(
            rewards=torch.tensor(self.rewards, dtype=torch.float64),
            lengths=torch.tensor(self.lengths, dtype=torch.float64).view(shape),
            max_length=self.max_length,
            response_ids=self.ids,
            entropies=torch.tensor(self.entropies, dtype=torch.float64).view(shape),
            log_ratios=lambda: [
                torch.tensor(n, dtype=torch.float64) - torch.tensor(o, dtype=torch.float64)
                for n, o in zip(self.new, self.old, strict=True)
            ],
        )


def make_case(kind: str, seed: int = 0, groups: int = 3, size: int = 4) -> Case:
    rng = random.Random(f"{kind}{seed}")
    reward = {"equal": lambda: 0.1, "binary": lambda: float(rng.random() < 0.5)}.get(kind, lambda: rng.gauss(0, 1))
    rewards = [[reward() for _ in range(size)] for _ in range(groups)]
    lengths = [1 if kind == "one_token" else rng.randint(1, 9) for _ in range(groups * size)]
    log_ratio = (
        (lambda: rng.choice([-1e4, -20.5, 0.1, 20.5, 1e4])) if kind == "overflow" else lambda: rng.gauss(0, 0.8)
    )
    old = [[-rng.expovariate(1.0) for _ in range(n)] for n in lengths]
    return Case(
        rewards,
        ids=[[rng.randrange(3) for _ in range(n)] for n in lengths],
        old=old,
        new=[[o + log_ratio() for o in row] for row in old],
        entropies=[rng.uniform(0.1, 1.4) for _ in lengths],
    )


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's way: sum_i w_i sum_t f_it per_token_it over padded micro-batches.


def objective(loss, step, log_probs, old, micro_batches=None, before=0, after=0):
    """log_probs, old: N rows, one entry per token. before, after: places outside the response, holding anything."""
    terms = loss.terms(step)
    total = 0.0
    for rows in micro_batches or [range(len(log_probs))]:
        width = before + max(len(log_probs[i]) for i in rows) + after

        def padded(values, filler, rows=rows, width=width):
            return torch.stack(
                [
                    torch.cat([v.new_full((before,), filler), v, v.new_full((width - before - len(v),), filler)])
                    for v in (values[i] for i in rows)
                ]
            )

        def column(values, rows=rows):
            return values.flatten()[list(rows)].to(log_probs[0])[:, None]

        mask = padded([torch.ones_like(row) for row in log_probs], 0.0)
        per_token, clipped = terms.loss.per_token(
            padded(log_probs, -0.3), padded(old, -7.0), column(terms.columns["advantage"]), mask
        )
        assert per_token.shape == clipped.shape == mask.shape and clipped.dtype == torch.bool
        weights = column(terms.columns["weight"]) * mask
        if terms.token_weights is not None:
            weights = weights * padded([torch.tensor(f).to(log_probs[0]) for f in terms.token_weights], 5.0)
        total = total + (weights * per_token).sum()
    return total


def evaluate(loss, case, dtype=torch.float64, **layout):
    """(value, gradient in every token's log-prob), float64."""
    flat = torch.tensor(sum(case.new, []), dtype=torch.float64).to(dtype).requires_grad_()
    old = [torch.tensor(row, dtype=torch.float64).to(dtype) for row in case.old]
    value = objective(loss, case.step(), flat.split(case.lengths), old, **layout)
    (gradient,) = torch.autograd.grad(value, flat)
    return value.item(), gradient.double()


# ---------------------------------------------------------------------------------------------------------------------
# The oracles: the formulas as printed, one token at a time.


def oracle(formula, case, settings):
    tokens = [[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in row] for row in case.new]
    value = formula(case, tokens, **settings)
    leaves = sum(tokens, [])
    if not value.requires_grad:
        return value.item(), torch.zeros(len(leaves), dtype=torch.float64)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return value.item(), torch.tensor([0.0 if g is None else g.item() for g in gradients], dtype=torch.float64)


def z_scores(case):
    scores = []
    for group in case.rewards:
        deviation = statistics.stdev(group)
        scores += [(r - statistics.mean(group)) / (deviation + 1e-9) if deviation > 0 else 0.0 for r in group]
    return scores


def limited(x):
    """A log-ratio beyond 20 nats counts as 20, and has no gradient."""
    return x if abs(x.item()) <= 20 else torch.tensor(math.copysign(20.0, x.item()), dtype=torch.float64)


def clipped_gain(r, a, low, high, dual):
    """min(r A, clip(r) A) by cases; for A < 0 not below dual A."""
    if a >= 0:
        return r * a if r <= high else torch.tensor(high * a, dtype=torch.float64)
    gain = r * a if r >= low else torch.tensor(low * a, dtype=torch.float64)
    return gain if dual is None or gain >= dual * a else torch.tensor(dual * a, dtype=torch.float64)


def sum_over(case, tokens, per_token):
    """[sum_t per_token(i, t, log-ratio)] of each answer i."""
    return [
        sum(per_token(i, t, limited(new - case.old[i][t])) for t, new in enumerate(row))
        for i, row in enumerate(tokens)
    ]


def clipped_sums(case, tokens, a, low, high, dual):
    return sum_over(case, tokens, lambda i, t, x: clipped_gain(torch.exp(x), a[i], low, high, dual))


def grpo(case, tokens, eps_low=0.2, eps_high=0.2, dual_clip=None):
    sums = clipped_sums(case, tokens, z_scores(case), 1 - eps_low, 1 + eps_high, dual_clip)
    return -sum(s / n for s, n in zip(sums, case.lengths, strict=True)) / len(tokens)


def dr_grpo(case, tokens, eps_low=0.2, eps_high=0.2, dual_clip=None):
    centred = [r - statistics.mean(group) for group in case.rewards for r in group]
    sums = clipped_sums(case, tokens, centred, 1 - eps_low, 1 + eps_high, dual_clip)
    return -sum(sums) / (len(tokens) * case.max_length)


def dapo(case, tokens, eps_low=0.2, eps_high=0.28, dual_clip=None):
    sums = clipped_sums(case, tokens, z_scores(case), 1 - eps_low, 1 + eps_high, dual_clip)
    return -sum(sums) / sum(case.lengths)


def gspo(case, tokens, eps_low=3e-4, eps_high=4e-4, dual_clip=None):
    total = 0.0
    for a, row, old in zip(z_scores(case), tokens, case.old, strict=True):
        s = torch.exp(limited(sum(new - o for new, o in zip(row, old, strict=True)) / len(row)))
        total = total + clipped_gain(s, a, 1 - eps_low, 1 + eps_high, dual_clip)
    return -total / len(tokens)


def cispo(case, tokens, eps_low=1.0, eps_high=4.0):
    a = z_scores(case)

    def gain(i, t, x):
        return min(max(math.exp(x.item()), 1 - eps_low), 1 + eps_high) * a[i] * tokens[i][t]

    return -sum(sum_over(case, tokens, gain)) / sum(case.lengths)


def in_conflict(answer, rivals, t):
    """Whether t, and all before it or all after it, are shared with some rival, at the same place from that end."""
    shared_from_start = [any(u < len(r) and r[u] == answer[u] for r in rivals) for u in range(len(answer))]
    shared_from_end = [
        any(len(r) >= len(answer) - u and r[u - len(answer)] == answer[u] for r in rivals) for u in range(len(answer))
    ]
    return all(shared_from_start[: t + 1]) or all(shared_from_end[t:])


def gtpo(case, tokens, gamma=0.1, conflict_weight=2.0, initial_entropy=None):
    a, h, size = z_scores(case), case.entropies, len(case.rewards[0])
    initial_entropy = statistics.mean(h) if initial_entropy is None else initial_entropy

    def gain(i, t, x):
        group = range(i // size * size, i // size * size + size)
        weight = 1.0
        if in_conflict(case.ids[i], [case.ids[j] for j in group if a[i] * a[j] < 0], t):
            weight = conflict_weight if a[i] > 0 else 0.0
        delta = 0.0 if initial_entropy < LN2 < h[i] else 1.0
        return delta * (a[i] - gamma * h[i]) * torch.exp(x) * weight

    sums = sum_over(case, tokens, gain)
    return -sum(s / n for s, n in zip(sums, case.lengths, strict=True)) / len(tokens)


def bapo_bounds(r, a, rho, low_range, high_range, step):
    """The first bounds on the way up c_low, then up c_high, that give positive samples their share; or the last."""

    def stations(start, end):
        return [start + k * step for k in range(math.ceil((end - start) / step - 1e-9))] + [end]

    lows, highs = stations(*low_range), stations(*high_range)
    for low, high in [(low, highs[0]) for low in lows] + [(lows[-1], high) for high in highs[1:]]:
        positive = math.fsum(min(x, high) * y for x, y in zip(r, a, strict=True) if y > 0)
        negative = math.fsum(max(x, low) * -y for x, y in zip(r, a, strict=True) if y < 0)
        if positive + negative == 0 or positive / (positive + negative) >= rho:
            break
    return low, high


BAPO = {"rho": 0.5, "low_range": (0.6, 0.9), "high_range": (1.2, 3.0), "step": 0.05}


def bapo(case, tokens, dual_clip=3.0, **settings):
    a, r, per_token = z_scores(case), [], []
    for i, row in enumerate(tokens):
        r += [math.exp(limited(new - o).item()) for new, o in zip(row, case.old[i], strict=True)]
        per_token += [a[i]] * len(row)
    low, high = bapo_bounds(r, per_token, **(BAPO | settings))
    return -sum(clipped_sums(case, tokens, a, low, high, dual_clip)) / sum(case.lengths)


def alpha_ppo(case, tokens, alpha=0.5, beta=1.0):
    a = z_scores(case)

    def gain(i, t, x):
        r = torch.exp(x)
        d = (1 - r ** (1 - alpha) + (1 - alpha) * (r - 1)) / (alpha * (1 - alpha))
        return r * a[i] - beta * d

    return -sum(sum_over(case, tokens, gain)) / sum(case.lengths)


FORMULAS = {f.__name__: f for f in (grpo, dr_grpo, dapo, gspo, cispo, gtpo, bapo, alpha_ppo)} | {"g2rpo_a": grpo}
SETTINGS = [(name, {}) for name in FORMULAS] + [
    ("grpo", {"eps_low": 0.3, "eps_high": 0.5, "dual_clip": 1.6}),
    ("dr_grpo", {"dual_clip": 2.0}),
    ("gspo", {"eps_low": 0.1, "eps_high": 0.2}),
    ("gspo", {"eps_low": 0.1, "eps_high": 0.2, "dual_clip": 1.3}),
    ("cispo", {"eps_low": 0.2, "eps_high": 0.3}),
    ("gtpo", {"initial_entropy": 0.69}),  # under ln 2: answers above it are dropped
    ("gtpo", {"initial_entropy": 0.70, "gamma": 0.4, "conflict_weight": 3.0}),
    ("bapo", {"rho": 0.7, "dual_clip": None}),
    ("bapo", {"rho": 0.45, "dual_clip": 1.6, "low_range": (0.5, 0.95), "high_range": (1.1, 1.3)}),
    ("alpha_ppo", {"alpha": 0.1, "beta": 0.3}),
    ("alpha_ppo", {"alpha": 0.9}),
]


@pytest.mark.parametrize("kind", ["random", "binary", "equal", "one_token", "overflow"])
@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_value_and_gradient_are_the_formula_s(name, settings, kind):
    for seed in range(2):
        case = make_case(kind, seed)
        expected, expected_gradient = oracle(FORMULAS[name], case, settings)
        assert math.isfinite(expected) and expected_gradient.isfinite().all()
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            value, gradient = evaluate(TOKEN_LOSSES[name](**settings), case, dtype)
            assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)
            torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=tolerance)


def test_the_cases_reach_every_branch():
    """Otherwise equality above would mean little."""
    case = make_case("random")
    r = [math.exp(n - o) for new, old in zip(case.new, case.old, strict=True) for n, o in zip(new, old, strict=True)]
    assert min(r) < 0.5 and max(r) > 3 and min(case.lengths) < max(case.lengths)
    assert min(case.entropies) < LN2 < max(case.entropies)
    weights = TOKEN_LOSSES["gtpo"]().terms(case.step()).token_weights
    assert {f for row in weights for f in row} == {0.0, 1.0, 2.0}
    assert 1.2 < TOKEN_LOSSES["bapo"](rho=0.7).terms(case.step()).loss.bounds[1]


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_equal_rewards_teach_nothing_but_what_needs_no_reward(name):
    case = make_case("equal")
    _, gradient = evaluate(TOKEN_LOSSES[name](), case)
    if name in ("gtpo", "alpha_ppo"):  # gamma * entropy, beta * divergence
        settings = {"gtpo": {"gamma": 0.0}, "alpha_ppo": {"beta": 0.0}}[name]
        assert gradient.abs().max() > 1e-3
        _, gradient = evaluate(TOKEN_LOSSES[name](**settings), case)
    assert gradient.abs().max() < 1e-16


# ---------------------------------------------------------------------------------------------------------------------
# Any micro-batching, order and padding.


@pytest.mark.parametrize("layout", ["singles", "pairs", "uneven", "reversed", "padded"])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_micro_batches_order_and_padding_change_nothing(name, layout):
    case, everything = make_case("random", seed=5), list(range(12))
    shuffled = random.Random(1).sample(everything, 12)
    layouts = {
        "singles": {"micro_batches": [[i] for i in shuffled]},
        "pairs": {"micro_batches": [shuffled[k : k + 2] for k in range(0, 12, 2)], "before": 3},
        "uneven": {"micro_batches": [shuffled[:7], shuffled[7:8], shuffled[8:]], "before": 1, "after": 2},
        "reversed": {"micro_batches": [everything[::-1]]},
        "padded": {"before": 17, "after": 30},
    }
    value, gradient = evaluate(TOKEN_LOSSES[name](), case)
    other, other_gradient = evaluate(TOKEN_LOSSES[name](), case, **layouts[layout])
    assert other == pytest.approx(value, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_an_advantage_per_token_is_taken_as_one(name):
    case = make_case("random")
    terms = TOKEN_LOSSES[name]().terms(case.step())
    new, old = torch.randn(2, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask, advantages = torch.ones_like(new), terms.columns["advantage"].view(12, 1)
    for one, other in zip(
        terms.loss.per_token(new, old, advantages, mask),
        terms.loss.per_token(new, old, advantages.expand(12, 5), mask),
        strict=True,
    ):
        assert torch.equal(one, other)
