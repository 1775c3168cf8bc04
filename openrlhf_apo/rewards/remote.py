"""`--reward.remote_url`: OpenRLHF's `reward_func` file or HTTP servers, one sample a call as OpenRLHF does."""

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor

from openrlhf.utils.agent import SingleTurnAgentExecutor

from openrlhf_apo.errors import OptionError, RewardFailure
from openrlhf_apo.rewards.reward import Reward

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
                "it has no reward_func" if isinstance(error, AttributeError) else f"{type(error).__name__}: {error}"
            )
            raise OptionError(f"--reward.remote_url {urls[0]} cannot be loaded: {reason.splitlines()[0]}") from None
        self.timeout = timeout
        self.fetch = (
            self.executor._fetch_rewards_via_func
            if self.executor.reward_func
            else self.executor._fetch_rewards_via_http
        )

    @staticmethod
    def check_label(label) -> None:
        """Any label will do: the function knows what it gets."""

    def __call__(self, prompts: list[str], responses: list[str], labels: list) -> list[Reward | RewardFailure]:
        # Not asyncio.run: it would wait for the thread of a hung function, which is never done.
        loop = asyncio.new_event_loop()
        loop.set_default_executor(ThreadPoolExecutor(max_workers=MAX_CALLS))
        try:
            return loop.run_until_complete(self._score(prompts, responses, labels))
        finally:
            loop.close()

    async def _score(self, prompts, responses, labels) -> list[Reward | RewardFailure]:
        limit = asyncio.Semaphore(MAX_CALLS)  # a sample's time starts when a thread is free for it

        async def score(prompt: str, response: str, label) -> Reward | RewardFailure:
            async with limit:
                try:
                    answers = await asyncio.wait_for(self.fetch([prompt + response], [prompt], [label]), self.timeout)
                    return _reward(answers)
                except RewardFailure as failure:
                    return failure
                except TimeoutError:
                    return RewardFailure(f"took more than {self.timeout:g} s")
                except Exception as error:
                    return RewardFailure(f"raised {type(error).__name__}: {error}")

        return await asyncio.gather(*map(score, prompts, responses, labels))


def _reward(answers: list) -> Reward:
    """The reward of the one sample asked for, out of OpenRLHF's `[{"rewards": tensor, ...}]`."""
    if not answers or not isinstance(answers[0], dict) or answers[0].get("rewards") is None:
        raise RewardFailure(f"returned {answers[0] if answers else None!r} instead of {{'rewards': ...}}")
    answer = answers[0]
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
