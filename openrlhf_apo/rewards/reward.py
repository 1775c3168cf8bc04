"""What a reward is, whatever computes it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from openrlhf_apo.errors import RewardFailure


@dataclass(frozen=True)
class Reward:
    """Of one sample. score: what dynamic filtering looks at, where it is another number. extra: further numbers that
    are only logged."""

    value: float
    score: float | None = None
    extra: dict[str, float] = field(default_factory=dict)


# (prompts, responses, labels) of N samples -> N rewards, or why a sample has none
RewardFunction = Callable[[list[str], list[str], list], list[Reward | RewardFailure]]
