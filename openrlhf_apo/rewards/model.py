"""A reward model's opinion as a reward."""

import math
from collections.abc import Callable, Sequence

from openrlhf_apo.errors import RewardFailure
from openrlhf_apo.rewards.reward import Answer, Reward

# Token ids of N prompts with their answers -> N rewards.
Rate = Callable[[list[list[int]]], list[float]]


class ModelReward:
    """rate: wherever the model is."""

    not_verified = 0

    def __init__(self, rate: Rate):
        self.rate = rate

    def check_label(self, label: object) -> None:
        """A reward model reads no labels."""

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure]:
        values = self.rate([answer.token_ids for answer in answers])
        return [Reward(value) if math.isfinite(value) else RewardFailure(f"is {value}") for value in values]
