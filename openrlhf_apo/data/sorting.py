"""Numbers to sort: one right answer, and partial credit on the way to it.

The answer to "Sort 41 17 93 25 60 12" is `12 17 25 41 60 93`; the reward is the share of it that is right from the
beginning on (rewards/sorting.py).
"""

import random

from openrlhf_apo.data.tasks import Task, of_two_ranges

COUNT = 6


def sorting(seed: int) -> Task:
    return of_two_ranges(_row, "sorting", seed, steps=200)


def _row(rng: random.Random, numbers: range) -> dict:
    drawn = rng.sample(numbers, COUNT)
    ordered = " ".join(map(str, sorted(drawn)))
    return {
        "prompt": f"Sort {' '.join(map(str, drawn))}",
        "completion": ordered,
        "label": ordered,
    }
