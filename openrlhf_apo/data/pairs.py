"""Two numbers with the largest allowed sum: a graded reward, with several answers of different worth to each prompt.

"Two of 41 17 52 25 38 12, at most 70" has many right answers. That of `52+17` is 1, as no allowed pair has a larger
sum; another right one is worth the share of allowed pairs that have none larger (rewards/pairs.py). The model has seen
allowed pairs drawn at random.
"""

import random
from itertools import combinations

from openrlhf_apo.data.tasks import Task, of_two_ranges

COUNT = 6


def pairs(seed: int) -> Task:
    return of_two_ranges(_row, "pairs", seed, steps=600)


def _row(rng: random.Random, numbers: range) -> dict:
    """Of the 15 pairs, 8 to 14 are allowed."""
    drawn = rng.sample(numbers, COUNT)
    sums = sorted(map(sum, combinations(drawn, 2)))
    limit = rng.choice(sums[7:14])
    allowed = [pair for pair in combinations(drawn, 2) if sum(pair) <= limit]
    return {
        "prompt": f"Two of {' '.join(map(str, drawn))}, at most {limit}",
        "completion": "+".join(map(str, rng.sample(rng.choice(allowed), 2))),
        "label": {"numbers": drawn, "limit": limit},
    }
