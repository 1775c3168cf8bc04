"""A reward that is a Python function of one answer, for training from Python."""

import math
from collections.abc import Callable

from openrlhf_apo.errors import RewardFailure
from openrlhf_apo.rewards.reward import Reward


class FunctionReward:
    """function(prompt, response, label) -> a finite number. What it raises is a failure of that answer."""

    not_verified = 0

    def __init__(self, function: Callable[[str, str, object], float]):
        self.function = function

    @staticmethod
    def check_label(label: object) -> None:
        """Any label will do: the function knows what it gets."""

    def __call__(
        self, prompts: list[str], responses: list[str], labels: list, max_failures: int
    ) -> list[Reward | RewardFailure]:
        return [self._one(*answer) for answer in zip(prompts, responses, labels, strict=True)]

    def _one(self, prompt: str, response: str, label: object) -> Reward | RewardFailure:
        try:
            value = float(self.function(prompt, response, label))
        except Exception as error:  # whatever the user's function raises
            return RewardFailure(f"raised {type(error).__name__}: {error}")
        return Reward(value) if math.isfinite(value) else RewardFailure(f"is {value}")
