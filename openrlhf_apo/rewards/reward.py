"""What a reward is, whatever computes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from openrlhf_apo.errors import RewardFailure


@dataclass(frozen=True)
class Reward:
    """Of one sample. score: what dynamic filtering looks at, where it is another number. extra: further numbers that
    are only logged."""

    value: float
    score: float | None = None
    extra: dict[str, float] = field(default_factory=dict)


class RewardFunction(Protocol):
    """not_verified: how many answers of the run it could not verify."""

    not_verified: int

    def __call__(self, prompts: list[str], responses: list[str], labels: list) -> Sequence[Reward | RewardFailure]:
        """The rewards of N samples, or why a sample has none."""
