"""What rewards of held-out answers add up to: pass@k, and the interval of a mean over prompts.

pass@k is the expected best of k answers, of which n >= k were sampled. For rewards of 0 and 1, c of them 1, it is the
unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. 2021, arXiv 2107.03374, Eq. 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import fmean

import numpy as np

Z = 1.959964  # 97.5 % quantile of the normal distribution
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """Mean over `prompts` prompts of one data source (or "all"), and its 95 % confidence interval.

    name: greedy, pass@k, or best of k where rewards are graded. method: of the interval, wilson or bootstrap.
    """

    name: str
    datasource: str
    prompts: int
    mean: float
    low: float
    high: float
    method: str


def pass_at_k(rewards: Sequence[float], k: int) -> float:
    """Mean over all subsets of k of rewards[n] of the subset's largest; 1 <= k <= n."""
    ordered = sorted(rewards)
    subsets = sum(comb(i, k - 1) * reward for i, reward in enumerate(ordered))  # the i-th is the largest of so many
    return subsets / comb(len(ordered), k)


def interval(values: Sequence[float]) -> tuple[float, float, str]:
    """95 % confidence interval of the mean of values[N], and how it was made.

    Of values that are all 0 or 1 it is Wilson's; of others the percentiles of the means of resamples (bootstrap),
    with a fixed seed.
    """
    n, array = len(values), np.array(values, dtype=float)
    mean = float(array.mean())
    if np.isin(array, (0.0, 1.0)).all():
        scale, centre = 1 + Z**2 / n, mean + Z**2 / (2 * n)
        half = Z * sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), "wilson"
    generator = np.random.default_rng(0)
    means = [array[generator.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5)).tolist()
    return low, high, "bootstrap"


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... and n: the k of which pass@k is told."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def scores(name: str, values: Sequence[float], datasources: Sequence[str]) -> list[Score]:
    """Of all prompts and, where there are several sources, of each. values, datasources: of each prompt."""
    names = sorted(set(datasources))
    found = []
    for source in ["all", *(names if len(names) > 1 else [])]:
        mine = [value for value, at in zip(values, datasources, strict=True) if source in ("all", at)]
        low, high, method = interval(mine)
        found.append(Score(name, source, len(mine), fmean(mine), low, high, method))
    return found


def table(found: list[Score]) -> str:
    width = max(len("data source"), *(len(score.datasource) for score in found))
    lines = [f"{'':<10} {'data source':<{width}} {'prompts':>8} {'mean':>8}   95 % interval"]
    for each in found:
        between = f"{each.low:.4f} to {each.high:.4f} ({each.method})"
        lines.append(f"{each.name:<10} {each.datasource:<{width}} {each.prompts:>8} {each.mean:>8.4f}   {between}")
    return "\n".join(lines)
