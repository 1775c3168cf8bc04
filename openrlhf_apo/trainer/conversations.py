"""From what an agent returns of a conversation to a sample and its reward."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from openrlhf_apo.errors import RewardFailure
from openrlhf_apo.rewards.reward import Reward, reward_of
from openrlhf_apo.trainer.completions import Request
from openrlhf_apo.trainer.samples import Prompt, Sample

# Where feedback stands in the text of a conversation, for a reader.
FEEDBACK = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}{}\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"


@dataclass(eq=False)
class Turn:
    request: Request
    completion: asyncio.Future  # a Completion


@dataclass(eq=False)
class Conversation:
    """outcome: None while it goes on. asked: the turns that wait for the policy. timer: runs while the environment has
    the word."""

    prompt: Prompt
    place: int  # in its group
    sample: Sample
    outcome: Reward | RewardFailure | None = None
    turns: int = 0
    asked: list[Turn] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task | None = None

    @classmethod
    def of(cls, prompt: Prompt, place: int) -> "Conversation":
        sample = Sample(prompt.group_id, prompt.text, prompt.label, prompt.datasource, [], [], "", [], False)
        return cls(prompt, place, sample)


def fill(sample: Sample, found: Any, max_len: int, decode: Callable[[list[int]], str]) -> Reward:
    """Fill `sample` with what `AgentExecutor.execute` returned, cut at max_len tokens as OpenRLHF cuts it. -> the
    reward.

    The prompt is all that stands before the first action. It is truncated where the last turn was, or where nothing of
    max_len is left. Raises RewardFailure for what cannot be trained on.
    """
    if not isinstance(found, dict):
        raise RewardFailure(f"returned {found!r:.200}, and no dict")
    if missing := [key for key in ("observation_tokens", "action_ranges", "rollout_log_probs") if key not in found]:
        raise RewardFailure(f"returned no {missing[0]}")
    tokens, log_probs = list(found["observation_tokens"]), found["rollout_log_probs"]
    if log_probs is None or len(log_probs) != len(tokens):
        count = 0 if log_probs is None else len(log_probs)
        raise RewardFailure(f"returned {count} rollout_log_probs for {len(tokens)} observation_tokens")
    own = [False] * len(tokens)
    for start, end in found["action_ranges"]:
        if not 0 < start <= end <= len(tokens):
            raise RewardFailure(f"returned an action range from {start} to {end}, of {len(tokens)} tokens")
        own[start:end] = [True] * (end - start)
    if True not in own[:max_len]:
        raise RewardFailure("returned a conversation without a token of the policy's")
    reward = reward_of(
        {"rewards": found.get("reward"), "scores": found.get("scores"), "extra_logs": found.get("extra_logs")}
    )
    first = own.index(True)
    own = own[first:max_len]
    sample.prompt_ids, sample.response_ids = tokens[:first], tokens[first:max_len]
    sample.rollout_log_probs = [
        float(value) if mine else 0.0 for value, mine in zip(log_probs[first:max_len], own, strict=True)
    ]
    sample.own = None if all(own) else own
    sample.truncated = bool(found.get("truncated")) or len(tokens) >= max_len
    sample.response = _marked(sample.response_ids, own, decode)
    return reward


def _marked(ids: list[int], own: list[bool], decode: Callable[[list[int]], str]) -> str:
    """The text of a conversation, its feedback in brackets."""
    parts, start = [], 0
    for mine, run in groupby(own):
        end = start + len(list(run))
        text = decode(ids[start:end])
        parts.append(text if mine else FEEDBACK.format(text))
        start = end
    return "".join(parts)
