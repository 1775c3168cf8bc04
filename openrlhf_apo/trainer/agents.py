"""OpenRLHF's agents (`--train.agent_func_path`) in the place of an engine that answers and of a reward that scores.

A conversation earns its reward on its way, so the two are one here: the engine samples conversations, and the reward
says what they have earned. Agents run in a thread of their own, with one event loop for the whole run; the policy's
turns are sampled in the trainer's.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from openrlhf_apo.errors import RewardFailure, RunError
from openrlhf_apo.rewards.reward import Answer, Reward, RewardFunction
from openrlhf_apo.trainer.completions import Completion, Prefix, Request
from openrlhf_apo.trainer.conversations import Conversation
from openrlhf_apo.trainer.handles import EngineHandle, Pending, SamplingSettings
from openrlhf_apo.trainer.lockstep import AgentExecutor, Batch, Lockstep
from openrlhf_apo.trainer.samples import Prompt, Sample

GRACE = 30.0  # seconds past the time limit after which the agents' thread is taken to hang


class AgentReward:
    """RewardFunction: what the conversations that were sampled last have earned.

    executor: of the user's file. timeout: seconds that an environment may take between two turns.
    """

    not_verified = 0

    def __init__(self, executor: AgentExecutor, timeout: float):
        self.executor, self.timeout = executor, timeout
        self.outcomes: list[Reward | RewardFailure] = []

    def check_label(self, label: object) -> None:
        """Any label will do: the agent knows what it gets."""

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure]:
        assert len(answers) == len(self.outcomes)
        return self.outcomes


class AgentEngine:
    """EngineHandle that samples conversations by turns of `engine`, and leaves their outcomes with `reward`. One that
    failed has an empty response."""

    def __init__(self, engine: EngineHandle, tokenizer: Any, reward: AgentReward):
        self.engine, self.tokenizer, self.reward = engine, tokenizer, reward
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="agents", daemon=True).start()

    def generate(
        self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None = None
    ) -> list[Sample]:
        assert prefix is None  # guidance is refused beside an agent
        conversations = [Conversation.of(p, place) for p in prompts for place in range(settings.samples_per_prompt)]
        batches: queue.Queue[Batch | None] = queue.Queue()
        lockstep = Lockstep(
            conversations, self.reward.executor, self.tokenizer, settings, self.reward.timeout, batches
        )
        running = asyncio.run_coroutine_threadsafe(lockstep.run(), self.loop)
        while (batch := self._next(lockstep)) is not None:
            requests, completions = batch
            found = self.engine.complete(requests)
            lockstep.moved = time.monotonic()
            self.loop.call_soon_threadsafe(completions.set_result, found)
        running.result()
        self.engine.rest()
        self.reward.outcomes = [each.outcome for each in conversations if each.outcome is not None]
        return [each.sample for each in conversations]

    def begin(self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None = None) -> Pending:
        samples = self.generate(prompts, settings, prefix)  # turns need the driver, so nothing runs beside training
        return lambda: samples

    @classmethod
    def of(cls, engine: EngineHandle, tokenizer: Any, reward: RewardFunction) -> EngineHandle:
        """The engine itself, where the reward is no agent's."""
        return cls(engine, tokenizer, reward) if isinstance(reward, AgentReward) else engine

    def _next(self, lockstep: Lockstep) -> Batch | None:
        limit = self.reward.timeout + GRACE
        while True:
            try:
                return lockstep.batches.get(timeout=1.0)
            except queue.Empty:
                if time.monotonic() - lockstep.moved > limit:
                    raise RunError(
                        f"the agent has done {limit:.0f} s without an await, and all conversations wait for it: put "
                        "what takes long behind asyncio.to_thread, or raise --reward.timeout"
                    ) from None

    def complete(self, requests: list[Request]) -> list[Completion]:
        return self.engine.complete(requests)

    def rest(self) -> None:
        self.engine.rest()

    @property
    def own_weights(self) -> bool:
        return self.engine.own_weights

    @property
    def restarts(self) -> int:
        return self.engine.restarts

    def sync_weights(self) -> None:
        self.engine.sync_weights()

    def check_weights(self) -> None:
        self.engine.check_weights()
