"""`--reward.remote_url`: OpenRLHF's `reward_func` file or HTTP servers, one sample a call as OpenRLHF does."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from openrlhf.utils.agent import SingleTurnAgentExecutor

from openrlhf_apo.errors import OptionError, RewardFailure, in_one_line
from openrlhf_apo.rewards.reward import Answer, Reward, reward_of

MAX_CALLS = 16  # at once


class RemoteReward:
    """urls: one .py file with `reward_func(queries, prompts, labels)`, or HTTP servers, asked in turn. timeout:
    seconds a call of the function, or all five tries of a request, may take; each request has OpenRLHF's 180 s.

    Both return {"rewards": ..., "scores": ..., "extra_logs": {name: ...}}, the last two optional.
    """

    not_verified = 0  # a user's reward has failures only

    def __init__(self, urls: list[str], timeout: float):
        try:
            self.executor = SingleTurnAgentExecutor(urls)
        except Exception as error:  # whatever the user's file raises
            reason = (
                "it has no reward_func(queries, prompts, labels)"
                if isinstance(error, AttributeError) and "no attribute 'reward_func'" in str(error)
                else in_one_line(error)
            )
            raise OptionError(f"the reward {urls[0]} cannot be loaded: {reason}") from None
        self.timeout = timeout
        self.fetch = (
            self.executor._fetch_rewards_via_func
            if self.executor.reward_func
            else self.executor._fetch_rewards_via_http
        )

    def check_label(self, label: object) -> None:
        """Any label will do: the function knows what it gets."""

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure | None]:
        # Not asyncio.run: it would wait for the thread of a hung function, which is never done.
        loop = asyncio.new_event_loop()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=MAX_CALLS))
        try:
            return loop.run_until_complete(self._score(answers, max_failures))
        finally:
            loop.close()

    async def _score(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure | None]:
        failures = 0
        limit = asyncio.Semaphore(MAX_CALLS)  # a sample's time starts when a thread is free for it

        async def score(answer: Answer) -> Reward | RewardFailure | None:
            nonlocal failures
            async with limit:
                if failures > max_failures:  # which decides; a function that hangs would hang for every sample
                    return None
                try:
                    query = answer.prompt + answer.response
                    found = await asyncio.wait_for(self.fetch([query], [answer.prompt], [answer.label]), self.timeout)
                    return reward_of(found[0] if found else None)
                except RewardFailure as error:
                    failure = error
                except TimeoutError:
                    failure = RewardFailure(f"took more than {self.timeout:g} s")
                    # What hangs keeps its thread for good, for which the others would wait.
                    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_CALLS))
                except Exception as error:
                    failure = RewardFailure(f"raised {type(error).__name__}: {error}")
                failures += 1
                return failure

        return await asyncio.gather(*map(score, answers))
