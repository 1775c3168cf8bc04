"""Numbers to sort: one right answer, and partial credit on the way to it.

The answer to "Sort 41 17 93 25 60 12" is `12 17 25 41 60 93`; the reward is the share of it that is right from the
beginning on (rewards/sorting.py).
"""

import random

from openrlhf_apo.data.tasks import Task, different

COUNT = 6
NUMBERS, LARGER = range(10, 60), range(50, 100)


def sorting(seed: int) -> Task:
    """Trained on numbers from 10 to 59, shifted to those from 50 to 99; the warm-up has rows of both."""
    rng = random.Random(seed)
    taken: set[str] = set()
    held_out = different(lambda: _row(rng, NUMBERS, "sorting"), 1024, taken)
    shifted = different(lambda: _row(rng, LARGER, "sorting_shifted"), 512, taken)
    train = different(lambda: _row(rng, NUMBERS, "sorting"), 10_000, taken)
    larger = different(lambda: _row(rng, LARGER, "sorting"), 10_000, taken)
    return Task(train + larger, train[:4096], held_out, shifted, steps=200, target=1.0)


def _row(rng: random.Random, numbers: range, datasource: str) -> dict:
    drawn = rng.sample(numbers, COUNT)
    ordered = " ".join(map(str, sorted(drawn)))
    return {
        "prompt": f"Sort {' '.join(map(str, drawn))}",
        "completion": ordered,
        "label": ordered,
        "datasource": datasource,
    }
