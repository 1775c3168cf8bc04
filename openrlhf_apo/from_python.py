"""Training by one call, in a notebook or a script of your own."""

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TextIO

import yaml

from openrlhf_apo.embedded.launch import train as run
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve, run_plan, start_up_warnings
from openrlhf_apo.options.resolve import flatten
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.plan import RewardPart
from openrlhf_apo.trainer.stop import StopSignals

logger = logging.getLogger(__name__)


def train(
    model: str,
    prompts: list[dict],
    reward_func: Callable[[str, str, Any], float] | dict[str, tuple[Callable[[str, str, Any], float], float]],
    *,
    output: str,
    held_out: list[dict] | None = None,
    console: TextIO = sys.stderr,
    **flags: Any,
) -> list[dict]:
    """Train a model in this process; the trained one and everything about the run are in the folder `output`.

    model: a Hugging Face folder or name. prompts, held_out: rows with `prompt` and, where the reward needs it,
    `label`. reward_func(prompt, response, label): a finite number; or several that are added up, {name: (function,
    weight)}, of which the first is the score that evaluations show. flags: those of the command line, nested as in a
    --config file: train(..., loss="apo", rollout={"batch_size": 16}, train={"batch_size": 64}). Of those of rewards,
    `reward.max_failures`.

    An interrupt leaves a checkpoint, from which `ckpt={"load_enable": True}` goes on.

    Returns the lines of metrics.jsonl. Raises OptionError, DataError or RunError, one line, as the command would
    print.
    """
    os.makedirs(output, exist_ok=True)
    given = flatten(flags)
    max_failures = given.pop("reward.max_failures", 0)
    if not isinstance(max_failures, int) or max_failures < 0:
        raise OptionError(f"reward.max_failures {max_failures!r}: must be a whole number, 0 or more")
    if unused := [flag for flag in given if flag.startswith("reward")]:
        raise OptionError(f"{unused[0]} has no effect: the reward is the function reward_func, in this process")
    settings = {
        "actor.model_name_or_path": model,
        "data.prompt_dataset": _written(output, "prompts.jsonl", prompts),
        "reward": "math_verify",  # replaced below
        "runtime": "embedded",
        "ckpt.output_dir": output,
        "ckpt.path": os.path.join(output, "ckpt"),
    }
    if held_out is not None:
        settings["eval.dataset"] = _written(output, "held_out.jsonl", held_out)
    if own := [flag for flag in settings if flag in given]:
        raise OptionError(f"{own[0]} is set by train itself, in this process: drop it (the command runs on Ray, too)")
    config = os.path.join(output, "flags.yaml")
    with open(config, "w", encoding="utf-8") as file:
        yaml.safe_dump(settings | given, file)
    argv = ["--config", config]
    args = resolve(argv)
    plan = run_plan(args, argv)
    plan = replace(
        plan,
        reward=replace(plan.reward, parts=_parts(reward_func), max_failures=max_failures),
        data=replace(plan.data, label_optional=True),
    )
    for warning in start_up_warnings(args, plan):
        logger.warning(warning)
    with StopSignals() as stop:
        run(plan, args, console, stop)
    return read_metrics(os.path.join(output, "metrics.jsonl"))


def _parts(reward_func: Callable | dict) -> tuple[RewardPart, ...]:
    rewards = reward_func if isinstance(reward_func, dict) else {"reward_func": (reward_func, 1.0)}
    parts = []
    for name, entry in rewards.items():
        match entry:
            case (function, int() | float() as weight) if callable(function) and math.isfinite(weight):
                parts.append(RewardPart(name, None, math.inf, weight, function))
            case _:
                raise OptionError(f"reward_func {name!r}: give (function, weight), the weight a finite number")
    if not parts:
        raise OptionError("reward_func is empty: give a function, or {name: (function, weight)}")
    return tuple(parts)


def _written(folder: str, name: str, rows: list[dict]) -> str:
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path
