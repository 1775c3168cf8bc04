"""What a reward is, whatever computes it."""

import math
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


@dataclass(frozen=True)
class Answer:
    """What is scored."""

    prompt: str  # after the template, with the part of a solution that guidance shows
    response: str
    label: object  # as the data has it
    token_ids: list[int] = field(default_factory=list)  # prompt and response, by the policy's tokenizer


class RewardFunction(Protocol):
    """not_verified: how many answers of the run it could not verify."""

    not_verified: int

    def check_label(self, label: object) -> str | None:
        """What is wrong with a label, for the reader of the data; None where nothing is."""

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> Sequence[Reward | RewardFailure | None]:
        """The rewards of N answers, or why one has none. Once more than max_failures have none the others need not be
        scored any more: None."""


def reward_of(answer: object) -> Reward:
    """Out of what a `reward_func` or a server says of one sample, OpenRLHF's `{"rewards": [1.0], ...}`. Raises
    RewardFailure for anything else than finite numbers."""
    if not isinstance(answer, dict) or answer.get("rewards") is None:
        raise RewardFailure(f"returned {answer!r:.200} instead of {{'rewards': ...}}")
    score = answer.get("scores")
    extra = {name: _number(value, f"{name} of extra_logs") for name, value in (answer.get("extra_logs") or {}).items()}
    return Reward(_number(answer["rewards"]), None if score is None else _number(score, "scores"), extra)


def _number(value, name: str | None = None) -> float:
    """One finite number. name: which entry it is, for the error; the rewards themselves need none."""
    value = value.flatten().tolist() if hasattr(value, "flatten") else value
    entry = "" if name is None else f"'s {name} "
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise RewardFailure(f"returned {len(value)} {name or 'rewards'} for 1 sample")
        value = value[0]
    if value is None:
        raise RewardFailure(f"{entry}is None")
    if not math.isfinite(float(value)):
        raise RewardFailure(f"{entry}is {float(value)}")
    return float(value)
