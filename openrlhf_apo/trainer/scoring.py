"""Scores a rollout, and never takes a bad reward for a number.

A reward that raises, is missing, is not finite, has the wrong length or takes too long stops the run with the sample
named. `--reward.max_failures N` allows N such samples in a run; each drops its whole group, and is counted.
"""

import logging
from collections import defaultdict

from openrlhf_apo.errors import RewardFailure, RunError
from openrlhf_apo.rewards.reward import Answer, RewardFunction
from openrlhf_apo.trainer.samples import Sample

logger = logging.getLogger(__name__)


class Scorer:
    """Sets the samples' rewards and keeps the failure budget of the run."""

    def __init__(self, reward: RewardFunction, max_failures: int):
        self.reward, self.max_failures = reward, max_failures
        self.failures = 0

    def score(self, samples: list[Sample]) -> list[Sample]:
        """The scored samples of the groups in which every sample could be scored."""
        answers = [Answer(s.prompt + s.shown, s.response, s.label, s.prompt_ids + s.response_ids) for s in samples]
        rewards = self.reward(answers, self.max_failures - self.failures)
        failed: dict[int, int] = defaultdict(int)
        for sample, reward in zip(samples, rewards, strict=True):
            if reward is None:  # left out for the failures that follow
                continue
            if not isinstance(reward, RewardFailure):
                sample.reward, sample.score, sample.extra = reward.value, reward.score, reward.extra
                continue
            failed[sample.group_id] += 1
            self.failures += 1
            message = (
                f"the reward {reward} (prompt {sample.prompt[-80:]!r}, response {sample.response[:80]!r}, "
                f"label {sample.label!r})"
            )
            if self.failures > self.max_failures:
                count = "a reward" if self.failures == 1 else f"{self.failures} rewards"
                raise RunError(f"{message}; {count} failed, and --reward.max_failures is {self.max_failures}")
            logger.warning("%s; its group is dropped (failure %d of %d)", message, self.failures, self.max_failures)
        return [sample for sample in samples if sample.group_id not in failed]

    def metrics(self) -> dict[str, int]:
        """Totals of the run so far."""
        return {"reward_failures": self.failures, "verifier_failures": self.reward.not_verified}

    def state_dict(self) -> dict:
        return {"failures": self.failures, "not_verified": self.reward.not_verified}

    def load_state_dict(self, state: dict) -> None:
        self.failures, self.reward.not_verified = state["failures"], state["not_verified"]
