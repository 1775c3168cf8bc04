"""Several rewards as one: their weighted sum."""

from collections.abc import Sequence

from openrlhf_apo.errors import RewardFailure
from openrlhf_apo.rewards.reward import Answer, Reward, RewardFunction


class WeightedReward:
    """parts: name -> (reward, weight). An answer's reward is the sum of weight times reward.

    Its score is the first part's, and the rewards of all parts are logged by name. An answer that one part cannot
    score has no reward.
    """

    def __init__(self, parts: dict[str, tuple[RewardFunction, float]]):
        self.parts = parts
        self.not_verified = 0

    def check_label(self, label: object) -> str | None:
        """What the first part that objects to a label says is wrong with it."""
        return next((wrong for part, _ in self.parts.values() if (wrong := part.check_label(label))), None)

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure | None]:
        before = self._not_verified()
        columns = [part(answers, max_failures) for part, _ in self.parts.values()]  # [parts][answers]
        self.not_verified += self._not_verified() - before
        return [self._sum(found) for found in zip(*columns, strict=True)]

    def _not_verified(self) -> int:
        return sum(part.not_verified for part, _ in self.parts.values())

    def _sum(self, found: tuple[Reward | RewardFailure | None, ...]) -> Reward | RewardFailure | None:
        """found: of one answer, by part."""
        rewards: dict[str, Reward] = {}
        for name, reward in zip(self.parts, found, strict=True):
            if isinstance(reward, RewardFailure):
                return RewardFailure(f"{name} {reward}")
            if reward is not None:
                rewards[name] = reward
        if len(rewards) < len(found):
            return None
        first = next(iter(rewards.values()))
        extra = {name: reward.value for name, reward in rewards.items()}
        extra |= {f"{name}/{key}": value for name, reward in rewards.items() for key, value in reward.extra.items()}
        return Reward(
            sum(weight * rewards[name].value for name, (_, weight) in self.parts.items()),
            first.value if first.score is None else first.score,
            extra,
        )
