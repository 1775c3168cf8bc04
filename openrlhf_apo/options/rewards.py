"""What the words of --reward stand for: math_verify, a file, or servers."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from openrlhf_apo.errors import OptionError
from openrlhf_apo.trainer.plan import RewardPart

Kind = Literal["math_verify", "file", "server"]
SECONDS: dict[Kind, float] = {"math_verify": 10.0, "file": 180.0, "server": 900.0}  # default of --reward.timeout
OURS = "trainer"  # --reward.remote_url to OpenRLHF, where rewards come from neither a file nor servers alone
CHOICES = "give --reward FILE.py, a URL (http://...) or math_verify"


def kind_of(word: str) -> Kind | None:
    """None for what is no reward."""
    urls = word.split(",")
    if word == "math_verify":
        return "math_verify"
    if all(url.startswith(("http://", "https://")) for url in urls):
        return "server"
    return "file" if len(urls) == 1 and word.endswith(".py") else None


def check_words(flag: str, words: Sequence[str]) -> None:
    for word in words:
        kind = kind_of(word)
        if kind is None and "," in word:
            raise OptionError(
                f"{flag} {word}: commas are for several servers of one reward; give several rewards as words: "
                f"--reward {word.replace(',', ' ')}"
            )
        if kind is None:
            raise OptionError(f"{flag} {word}: no such reward; {CHOICES}")
        if kind == "file" and not os.path.isfile(word):
            raise OptionError(f"{flag} {word}: no such file")


def reward_words(args: SimpleNamespace) -> list[str]:
    """One per reward that is no model."""
    if args.reward.name or args.reward.remote_url == [OURS]:
        return args.reward.name or []
    return [",".join(args.reward.remote_url)]


def reward_parts(args: SimpleNamespace) -> tuple[RewardPart, ...]:
    """The rewards that are added up, in their order, a reward model last. A file is called by its name without .py."""
    if agent := args.train.agent_func_path:
        return (RewardPart("agent", None, args.reward.timeout or SECONDS["file"], agent=agent),)
    words, model = reward_words(args), args.reward.model_name_or_path
    weights = _weights(args, len(words) + bool(model))
    kinds: list[Kind] = [kind for word in words if (kind := kind_of(word))]
    servers = 0
    parts: list[RewardPart] = []
    for word, kind, weight in zip(words, kinds, weights, strict=False):
        name = Path(word).stem if kind == "file" else kind
        if kind == "server":
            servers += 1
            name += f"_{servers}" if servers > 1 else ""
        if name in [part.name for part in parts]:
            raise OptionError(f"--reward {' '.join(words)}: two rewards are called {name}: rename a file")
        urls = None if kind == "math_verify" else word.split(",")
        parts.append(RewardPart(name, urls, args.reward.timeout or SECONDS[kind], weight))
    if model:
        if "model" in [part.name for part in parts]:
            raise OptionError("--reward model.py: the reward model is called model: rename the file")
        parts.append(RewardPart("model", None, math.inf, weights[-1], model=model))
    return tuple(parts)


def _weights(args: SimpleNamespace, count: int) -> list[float]:
    weights = args.reward.weights or [1.0] * count
    if len(weights) != count:
        raise OptionError(f"--reward.weights: {len(weights)} weights for {count} rewards: give one for each")
    if not all(map(math.isfinite, weights)):
        raise OptionError(f"--reward.weights {' '.join(f'{weight:g}' for weight in weights)}: must be finite numbers")
    return weights
