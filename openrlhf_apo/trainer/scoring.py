"""Scores a rollout, and never takes a bad reward for a number.

A reward that raises, is missing, is not finite, has the wrong length or takes too long stops the run with the sample
named. `--reward.max_failures N` allows N such samples in a run; each drops its whole group, and is counted.
"""

import asyncio
import logging
import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

from openrlhf_apo.rewards.math_verify import grade_many
from openrlhf_apo.trainer.ray_calls import RunError
from openrlhf_apo.trainer.samples import Sample

logger = logging.getLogger(__name__)

MAX_CALLS = 16  # of a user's reward function at once


class RewardFailure(Exception):
    """One sample could not be scored; the message says why."""


class MathVerifyReward:
    """`--reward math_verify`: 1 when the last boxed answer equals the label, else 0.

    An answer that hangs, kills or confuses the verifier is a wrong one, and is counted in `not_verified`.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.not_verified = 0

    def __call__(self, samples: list[Sample]) -> list[float | RewardFailure]:
        grades = grade_many([s.response for s in samples], [s.label for s in samples], timeout=self.timeout)
        self.not_verified += sum(grade.outcome != "ok" for grade in grades)
        return [grade.score for grade in grades]


class UpstreamReward:
    """`--reward.remote_url`: OpenRLHF's `reward_func` file or HTTP servers, one sample a call as OpenRLHF does."""

    not_verified = 0  # a user's reward has failures only

    def __init__(self, urls: list[str], timeout: float):
        from openrlhf.utils.agent import SingleTurnAgentExecutor

        self.executor, self.timeout = SingleTurnAgentExecutor(urls), timeout
        self.fetch = (
            self.executor._fetch_rewards_via_func
            if self.executor.reward_func
            else self.executor._fetch_rewards_via_http
        )

    def __call__(self, samples: list[Sample]) -> list[float | RewardFailure]:
        # Not asyncio.run: it would wait for the thread of a hung function, which is never done.
        loop = asyncio.new_event_loop()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=MAX_CALLS))
        try:
            return loop.run_until_complete(self._score(samples))
        finally:
            loop.close()

    async def _score(self, samples: list[Sample]) -> list[float | RewardFailure]:
        limit = asyncio.Semaphore(MAX_CALLS)  # a sample's time starts when a thread is free for it

        async def score(sample: Sample) -> float | RewardFailure:
            async with limit:
                try:
                    answers = await asyncio.wait_for(
                        self.fetch([sample.prompt + sample.response], [sample.prompt], [sample.label]), self.timeout
                    )
                    return _single_reward(answers)
                except RewardFailure as failure:
                    return failure
                except TimeoutError:
                    return RewardFailure(f"took more than {self.timeout:g} s")
                except Exception as error:
                    return RewardFailure(f"raised {type(error).__name__}: {error}")

        return await asyncio.gather(*map(score, samples))


def _single_reward(answers: list) -> float:
    """The reward of the one sample asked for, out of OpenRLHF's `[{"rewards": tensor, ...}]`."""
    if not answers or not isinstance(answers[0], dict) or answers[0].get("rewards") is None:
        raise RewardFailure(f"returned {answers[0] if answers else None!r} instead of {{'rewards': ...}}")
    value = answers[0]["rewards"]
    value = value.flatten().tolist() if hasattr(value, "flatten") else value
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise RewardFailure(f"returned {len(value)} rewards for 1 sample")
        value = value[0]
    if value is None:
        raise RewardFailure("is None")
    if not math.isfinite(float(value)):
        raise RewardFailure(f"is {float(value)}")
    return float(value)


class Scorer:
    """Sets `sample.reward` and keeps the failure budget of the run."""

    def __init__(self, reward, max_failures: int):
        self.reward, self.max_failures = reward, max_failures
        self.failures = 0

    def score(self, samples: list[Sample]) -> list[Sample]:
        """The scored samples of the groups in which every sample could be scored."""
        failed: dict[int, int] = defaultdict(int)
        for sample, value in zip(samples, self.reward(samples), strict=True):
            if not isinstance(value, RewardFailure):
                sample.reward = value
                continue
            failed[sample.group_id] += 1
            self.failures += 1
            message = (
                f"the reward {value} (prompt {sample.prompt[-80:]!r}, response {sample.response[:80]!r}, "
                f"label {sample.label!r})"
            )
            if self.failures > self.max_failures:
                raise RunError(f"{message}; failure {self.failures} of {self.max_failures} --reward.max_failures")
            logger.warning("%s; its group is dropped (failure %d of %d)", message, self.failures, self.max_failures)
        return [sample for sample in samples if sample.group_id not in failed]

    def metrics(self) -> dict[str, int]:
        """Totals of the run so far."""
        return {"reward_failures": self.failures, "verifier_failures": self.reward.not_verified}

    def state_dict(self) -> dict:
        return {"failures": self.failures, "not_verified": self.reward.not_verified}

    def load_state_dict(self, state: dict) -> None:
        self.failures, self.reward.not_verified = state["failures"], state["not_verified"]
