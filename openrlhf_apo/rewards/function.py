"""A reward that is a Python function of one answer, for training from Python."""

import math
from collections.abc import Callable, Sequence

from openrlhf_apo.errors import RewardFailure
from openrlhf_apo.rewards.reward import Answer, Reward


class FunctionReward:
    """function(prompt, response, label) -> a finite number. What it raises is a failure of that answer."""

    not_verified = 0

    def __init__(self, function: Callable[[str, str, object], float]):
        self.function = function

    def check_label(self, label: object) -> None:
        """Any label will do: the function knows what it gets."""

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure]:
        return list(map(self._one, answers))

    def _one(self, answer: Answer) -> Reward | RewardFailure:
        try:
            value = float(self.function(answer.prompt, answer.response, answer.label))
        except Exception as error:  # whatever the user's function raises
            return RewardFailure(f"raised {type(error).__name__}: {error}")
        return Reward(value) if math.isfinite(value) else RewardFailure(f"is {value}")
