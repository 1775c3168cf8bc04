"""What every engine does around sampling: prompts to tokens and seeds, tokens to samples."""

from collections.abc import Callable
from typing import Any, NamedTuple

from openrlhf_apo.errors import RunError
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.samples import Prompt, Sample

Prefix = Callable[[list[int]], list[int]]


class Completion(NamedTuple):
    ids: list[int]
    log_probs: list[float]  # of each token, nats
    truncated: bool  # by the length limit


class Request(NamedTuple):
    """What one completion is asked for by. max_tokens: it ends there at the latest, truncated."""

    ids: list[int]  # to go on from
    seed: int
    temperature: float
    top_p: float
    max_tokens: int


class Beginning(NamedTuple):
    """What an answer goes on from."""

    ids: list[int]
    shown: str = ""  # the part of them that is of the reference solution


def encode(tokenizer: Any, prompt: Prompt, settings: SamplingSettings, prefix: Prefix | None) -> Beginning:
    """prefix: see EngineHandle.generate. RunError for a prompt that leaves no room."""
    ids: list[int] = tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    limit = settings.prompt_limit
    if len(ids) > limit:
        raise RunError(
            f"a prompt has {len(ids)} tokens, but --data.max_len leaves {limit} beside the new tokens; raise "
            f"--data.max_len or filter the data (prompt {prompt.text[:80]!r})"
        )
    if prefix is None:
        return Beginning(ids)
    shown = prefix(tokenizer(prompt.solution, add_special_tokens=False)["input_ids"])[: limit - len(ids)]
    return Beginning(ids + shown, tokenizer.decode(shown, skip_special_tokens=False))


def seed_of(prompt: Prompt, settings: SamplingSettings, guided: bool) -> int:
    """A prompt's own seed, whichever engine or batch samples it. Guided answers are drawn apart from the free ones:
    their seed lies half way to the next prompt's."""
    return settings.seed * 1_000_003 + prompt.group_id * 1009 + (504 if guided else 0)


def samples_of(
    tokenizer: Any, prompts: list[Prompt], beginnings: list[Beginning], completions: list[list[Completion]]
) -> list[Sample]:
    """Unscored samples, in prompt order. beginnings, completions: of each prompt."""
    return [
        Sample(
            group_id=prompt.group_id,
            prompt=prompt.text,
            label=prompt.label,
            datasource=prompt.datasource,
            prompt_ids=beginning.ids,
            response_ids=completion.ids,
            response=tokenizer.decode(completion.ids, skip_special_tokens=False),
            rollout_log_probs=completion.log_probs,
            truncated=completion.truncated,
            shown=beginning.shown,
        )
        for prompt, beginning, answers in zip(prompts, beginnings, completions, strict=True)
        for completion in answers
    ]
