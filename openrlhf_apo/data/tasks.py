"""What the generated tasks have in common."""

import random
from collections.abc import Callable
from dataclasses import dataclass

NUMBERS, LARGER = range(10, 60), range(50, 100)


@dataclass(frozen=True)
class Task:
    """Rows of `prompt`, `completion`, `label` and `datasource`.

    warm: what the model is warmed up on; train: those of them that RL sees the prompts of. held_out: prompts like
    these that are neither in warm nor in train. shifted: others, of a range of numbers that the warm-up has and RL
    has not. steps, target: of the warm-up (warmup.py).
    """

    warm: list[dict]
    train: list[dict]
    held_out: list[dict]
    shifted: list[dict]
    steps: int
    target: float


def of_two_ranges(make_row: Callable[[random.Random, range], dict], name: str, seed: int, steps: int) -> Task:
    """Trained on numbers from 10 to 59, shifted to those from 50 to 99; the warm-up has rows of both. make_row: a row
    without its datasource."""
    rng = random.Random(seed)
    taken: set[str] = set()

    def rows(numbers: range, datasource: str, count: int) -> list[dict]:
        return different(lambda: make_row(rng, numbers) | {"datasource": datasource}, count, taken)

    held_out = rows(NUMBERS, name, 1024)
    shifted = rows(LARGER, f"{name}_shifted", 512)
    train = rows(NUMBERS, name, 10_000)
    return Task(train + rows(LARGER, name, 10_000), train[:4096], held_out, shifted, steps, target=1.0)


def different(make_row: Callable[[], dict], count: int, taken: set[str]) -> list[dict]:
    """`count` rows with prompts that are not yet in `taken`, and then are."""
    rows: list[dict] = []
    while len(rows) < count:
        row = make_row()
        if row["prompt"] not in taken:
            taken.add(row["prompt"])
            rows.append(row)
    return rows
