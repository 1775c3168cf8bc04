"""The conversations of a batch, turn by turn: what an agent has as its `llm_engine`.

OpenRLHF's engine serves single turns as they come. Here the conversations go in lockstep: once each has ended or waits
for the policy, the next turns of all are sampled as one batch, and then their environments go on, all at once. So
samples do not depend on how long an environment takes. Each turn has a seed of its own: that of the run, the prompt,
the place in the group and the turn.
"""

import asyncio
import hashlib
import queue
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from openrlhf_apo.errors import RewardFailure, in_one_line
from openrlhf_apo.rewards.reward import Reward
from openrlhf_apo.trainer.completions import Request
from openrlhf_apo.trainer.conversations import Conversation, Turn, fill
from openrlhf_apo.trainer.handles import SamplingSettings


class AgentExecutor(Protocol):
    """OpenRLHF's openrlhf.utils.agent.AgentExecutorBase. One serves all conversations."""

    async def execute(
        self,
        prompt: str,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: None = None,
    ) -> dict:
        """One conversation: `observation_tokens`, `action_ranges` of them, `rollout_log_probs` of each, `truncated`,
        `reward`, `scores` and `extra_logs`."""


@dataclass(slots=True)
class SamplingParams:
    """What an agent gets as `sampling_params`, by vLLM's names. It has no other attributes: to set one is an error,
    and not a wish that nobody reads. logprobs: those of the sampled tokens are always given."""

    temperature: float
    top_p: float
    max_tokens: int | None
    logprobs: int = 1


@dataclass(frozen=True)
class LogProb:
    logprob: float  # nats


@dataclass(frozen=True)
class TurnOutput:
    """As vLLM's CompletionOutput: token_ids with the token that ended the turn, text without it. finish_reason: stop
    or length."""

    token_ids: list[int]
    text: str
    logprobs: list[dict[int, LogProb]]
    finish_reason: str


@dataclass(frozen=True)
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[TurnOutput]


Batch = tuple[list[Request], asyncio.Future]  # and where their completions go

_conversation: ContextVar[Conversation] = ContextVar("conversation")


class Lockstep:
    """Runs in an event loop; batches of turns come out of `batches`, and None in the end. timeout: seconds that an
    environment may take between two turns."""

    def __init__(
        self,
        conversations: list[Conversation],
        executor: AgentExecutor,
        tokenizer: Any,
        settings: SamplingSettings,
        timeout: float,
        batches: "queue.Queue[Batch | None]",
    ):
        self.conversations, self.executor, self.tokenizer = conversations, executor, tokenizer
        self.settings, self.timeout, self.batches = settings, timeout, batches
        self.changed = asyncio.Event()  # a conversation has ended, or waits for the policy
        self.moved = time.monotonic()  # when one last did anything

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        try:
            for each in self.conversations:
                each.task = asyncio.create_task(self._converse(each))
            while live := [each for each in self.conversations if each.outcome is None]:
                self.changed.clear()
                if all(each.asked for each in live):
                    await self._take_turns(live)
                else:
                    await self.changed.wait()
        finally:
            self.batches.put(None)

    async def _take_turns(self, live: list[Conversation]) -> None:
        turns = [turn for each in live for turn in each.asked]
        for each in live:
            each.asked = []
        completions = self.loop.create_future()
        self.batches.put(([turn.request for turn in turns], completions))
        for turn, completion in zip(turns, await completions, strict=True):
            if not turn.completion.done():  # whoever asked may have given up
                turn.completion.set_result(completion)

    async def _converse(self, conversation: Conversation) -> None:
        _conversation.set(conversation)
        settings, prompt = self.settings, conversation.prompt
        self._start_timer(conversation)
        outcome: Reward | RewardFailure
        try:
            found = await self.executor.execute(
                prompt=prompt.text,
                label=prompt.label,
                sampling_params=SamplingParams(settings.temperature, settings.top_p, settings.max_new_tokens),
                max_length=settings.max_len,
                hf_tokenizer=self.tokenizer,
                llm_engine=self,
                images=None,
            )
            outcome = fill(conversation.sample, found, settings.max_len, self._text)
        except RewardFailure as failure:
            outcome = _missing(str(failure))
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # whatever the agent raises
            outcome = _missing(f"raised {in_one_line(error)}")
        self._stop_timer(conversation)
        conversation.outcome = conversation.outcome or outcome  # its time may have been over
        self.changed.set()

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: Any, multi_modal_data: Any = None
    ) -> RequestOutput:
        """One turn of the policy, as soon as all conversations wait for one."""
        conversation = _conversation.get(None)
        if conversation is None or asyncio.get_running_loop() is not self.loop:
            raise RewardFailure(
                "called llm_engine.generate from another thread or event loop than its conversation's: no turn of a "
                "conversation could be told from that of another"
            )
        if type(sampling_params) is not SamplingParams:
            raise RewardFailure(
                f"called llm_engine.generate with a {type(sampling_params).__name__}: hand on the sampling_params of "
                "execute, or a copy.deepcopy of them"
            )
        if multi_modal_data is not None:
            raise RewardFailure("called llm_engine.generate with multi_modal_data: prompts are text")
        ids, limit = list(prompt_token_ids), sampling_params.max_tokens
        room = self.settings.max_len - len(ids)
        limit = room if limit is None else min(limit, room)
        if limit < 1:
            raise RewardFailure(f"asked for a turn where --data.max_len {self.settings.max_len} leaves no room")
        seed = turn_seed(self.settings.seed, conversation)
        request = Request(ids, seed, sampling_params.temperature, sampling_params.top_p, limit)
        turn = Turn(request, self.loop.create_future())
        conversation.turns += 1
        conversation.asked.append(turn)
        self._stop_timer(conversation)
        self.changed.set()
        try:
            completion = await turn.completion
        finally:  # also where the agent gives up
            self._start_timer(conversation)
        tokens, log_probs = completion.ids, completion.log_probs
        output = TurnOutput(
            token_ids=tokens,
            text=self._text(tokens if completion.truncated else tokens[:-1]),
            logprobs=[{token: LogProb(value)} for token, value in zip(tokens, log_probs, strict=True)],
            finish_reason="length" if completion.truncated else "stop",
        )
        return RequestOutput(ids, [output])

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _start_timer(self, conversation: Conversation) -> None:
        self._stop_timer(conversation)
        conversation.timer = self.loop.call_later(self.timeout, self._expire, conversation)

    def _stop_timer(self, conversation: Conversation) -> None:
        self.moved = time.monotonic()
        if conversation.timer is not None:
            conversation.timer.cancel()

    def _expire(self, conversation: Conversation) -> None:
        assert conversation.task is not None
        conversation.outcome = _missing(f"took more than {self.timeout:g} s")
        conversation.task.cancel()
        self.changed.set()


def turn_seed(seed: int, conversation: Conversation) -> int:
    """Of its next turn, below 2^56."""
    place = (seed, conversation.prompt.group_id, conversation.place, conversation.turns)
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=7).digest())


def _missing(why: str) -> RewardFailure:
    return RewardFailure(f"is missing: the agent {why}")
