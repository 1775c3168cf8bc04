"""Two numbers with the largest allowed sum: a graded reward, with several answers of different worth to each prompt.

"Two of 41 17 52 25 38 12, at most 70" has many right answers. That of `52+17` is 1, as no allowed pair has a larger
sum; another right one is worth the share of allowed pairs that have none larger (rewards/pairs.py). The model has seen
allowed pairs drawn at random.
"""

import random
from itertools import combinations

from openrlhf_apo.data.tasks import Task, different

COUNT = 6
NUMBERS, LARGER = range(10, 60), range(50, 100)


def pairs(seed: int) -> Task:
    """Trained on numbers from 10 to 59, shifted to those from 50 to 99; the warm-up has rows of both."""
    rng = random.Random(seed)
    taken: set[str] = set()
    held_out = different(lambda: _row(rng, NUMBERS, "pairs"), 1024, taken)
    shifted = different(lambda: _row(rng, LARGER, "pairs_shifted"), 512, taken)
    train = different(lambda: _row(rng, NUMBERS, "pairs"), 10_000, taken)
    larger = different(lambda: _row(rng, LARGER, "pairs"), 10_000, taken)
    return Task(train + larger, train[:4096], held_out, shifted, steps=900, target=1.0)


def _row(rng: random.Random, numbers: range, datasource: str) -> dict:
    """Of the 15 pairs, 6 to 12 are allowed."""
    drawn = rng.sample(numbers, COUNT)
    sums = sorted(map(sum, combinations(drawn, 2)))
    limit = rng.choice(sums[5:12])
    allowed = [pair for pair in combinations(drawn, 2) if sum(pair) <= limit]
    return {
        "prompt": f"Two of {' '.join(map(str, drawn))}, at most {limit}",
        "completion": "+".join(map(str, rng.sample(rng.choice(allowed), 2))),
        "label": {"numbers": drawn, "limit": limit},
        "datasource": datasource,
    }
