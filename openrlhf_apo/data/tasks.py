"""What the generated tasks have in common."""

from collections.abc import Callable
from dataclasses import dataclass


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


def different(make_row: Callable[[], dict], count: int, taken: set[str]) -> list[dict]:
    """`count` rows with prompts that are not yet in `taken`, and then are."""
    rows: list[dict] = []
    while len(rows) < count:
        row = make_row()
        if row["prompt"] not in taken:
            taken.add(row["prompt"])
            rows.append(row)
    return rows
