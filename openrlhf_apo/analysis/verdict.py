"""What the metrics of a run say of it, in words, each by a rule that is stated beside it."""

import math
from dataclasses import dataclass
from statistics import fmean, median, stdev

from openrlhf_apo.trainer.health import Health
from openrlhf_apo.trainer.metrics import first_and_last_fifth

FEWEST = 10  # rollouts, before anything is said of learning
ROUNDING = 1e-5  # nats per token; what float32 leaves of equal weights is below
GROWTH = 3.0


@dataclass(frozen=True)
class Finding:
    """level: good, note, or look (at it)."""

    level: str
    text: str
    rule: str


def verdict(rows: list[dict]) -> list[Finding]:
    """Of the lines of a metrics.jsonl; a rule whose metric they do not have says nothing."""
    rules = (learning, alpha, equal_rewards, truncation, mismatch, gradient)
    return [finding for rule in rules if (finding := rule(rows)) is not None]


def learning(rows: list[dict]) -> Finding | None:
    rewards = _values(rows, "reward_mean")
    if not rewards:
        return None
    first, last, size = first_and_last_fifth(rewards)
    rule = (
        f"mean sampled reward of the last fifth of the rollouts ({size}) against the first fifth, beyond 2 standard "
        "errors of the difference; the noise of a rollout is taken from differences of consecutive ones"
    )
    if len(rewards) < FEWEST:
        return Finding("note", f"Too short to tell whether it learns: {len(rewards)} of {FEWEST} rollouts.", rule)
    noise = stdev([b - a for a, b in zip(rewards, rewards[1:], strict=False)]) / math.sqrt(2)
    error = noise * math.sqrt(2 / size)
    change = (
        f"the reward went from {first:.3f} to {last:.3f} ({last - first:+.3f}; 2 standard errors: {2 * error:.3f})"
    )
    if last - first > 2 * error:
        return Finding("good", f"It learns: {change}.", rule)
    if first - last > 2 * error:
        return Finding("look", f"It gets worse: {change}.", rule)
    return Finding("look", f"It does not show that it learns: {change}.", rule)


def alpha(rows: list[dict]) -> Finding | None:
    """Of the guarded controller, which alone has a confidence."""
    alphas, confidence, improvement = (_values(rows, key) for key in ("alpha", "confidence", "improvement"))
    if not (alphas and confidence and improvement):
        return None
    low, high = min(alphas), max(alphas)
    if high - low >= 0.02:
        return Finding("good", f"α moves, between {low:.3f} and {high:.3f}.", "range of α at least 0.02")
    c, p = fmean(confidence), fmean(improvement)
    cause = f"because the confidence is {c:.2g}" if c <= p else f"because the improvement is {p:.2g}"
    if min(c, p) > 0.3:
        cause = f"although confidence is {c:.2g} and improvement {p:.2g}: it follows them slowly"
    return Finding(
        "note",
        f"α hardly moves ({low:.3f} to {high:.3f}) {cause}.",
        "range of α below 0.02; confidence times improvement moves it, and the smaller mean, where below 0.3, is why",
    )


def equal_rewards(rows: list[dict]) -> Finding | None:
    shares = _values(rows, "zero_variance_fraction")
    if not shares:
        return None
    share = fmean(shares)
    return Finding(
        "look" if share > 0.5 else "note" if share > 0.2 else "good",
        f"{share:.0%} of the groups teach nothing (equal rewards).",
        "mean over the rollouts; a note above 20 %, to be looked at above 50 %: prompts too easy or too hard",
    )


def truncation(rows: list[dict]) -> Finding | None:
    shares = _values(rows, "truncated_fraction")
    if not shares:
        return None
    _, share, size = first_and_last_fifth(shares)
    return Finding(
        "look" if share > 0.1 else "good",
        f"{share:.0%} of the answers are cut off at the length limit.",
        f"mean of the last fifth ({size}); to be looked at above 10 %: a larger --rollout.max_new_tokens",
    )


def mismatch(rows: list[dict]) -> Finding | None:
    values = _values(rows, "rollout_mismatch")
    if not values:
        return None
    first, last, size = first_and_last_fifth(values, median)
    rule = (
        f"median of the last fifth ({size}), nats per token; rounding below {ROUNDING:g}; to be looked at when "
        f"{GROWTH:g} times the first fifth's, or above a tenth of the limit (--apo.max_mismatch, by default "
        f"{Health.max_mismatch:g})"
    )
    if last < ROUNDING:
        return Finding("good", f"Engine and trainer agree: their mismatch is {last:.1g}, rounding.", rule)
    grows = last > GROWTH * first
    return Finding(
        "look" if grows or last > 0.1 * Health.max_mismatch else "good",
        f"Engine and trainer differ by {last:.2g} nats per token" + (f", grown from {first:.2g}." if grows else "."),
        rule,
    )


def gradient(rows: list[dict]) -> Finding | None:
    norms = _values(rows, "grad_norm")
    if not norms:
        return None
    first, last, size = first_and_last_fifth(norms, median)
    rule = f"medians of the first and the last fifth ({size}); to be looked at when 0 or {GROWTH:g} times as large"
    if last == 0:
        return Finding("look", "The gradient is 0: nothing is learned any more.", rule)
    if last > GROWTH * first:
        return Finding(
            "look", f"The gradient norm grows, from {first:.2g} to {last:.2g}: lower --actor.adam.lr.", rule
        )
    return Finding("good", f"The gradient norm does not grow: {first:.2g} first, {last:.2g} last.", rule)


def _values(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]
