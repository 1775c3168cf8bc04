"""Runs of the real stack, by the command that a user types."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from openrlhf_apo.trainer.metrics import read_metrics

MODULE = [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray"]
FIRST_IS_A_DIGIT = "float(query[len(prompt):][:1].isdigit())"
DIGITS_REWARD = """
import torch

def reward_func(queries, prompts, labels, **kwargs):
    rewards = [sum(c.isdigit() for c in query[len(prompt):]) / 16 for query, prompt in zip(queries, prompts)]
    return {"rewards": torch.tensor(rewards), "scores": torch.tensor(rewards)}
"""


def train(
    flags: list[str], out: Path, *more: str, runtime: str = "ray", timeout: float = 240
) -> subprocess.CompletedProcess:
    where = ["--runtime", runtime, "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt")]
    command = [*MODULE, *flags, *where, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def succeed(flags: list[str], out: Path, *more: str, runtime: str = "ray") -> list[dict]:
    result = train(flags, out, *more, runtime=runtime)
    assert result.returncode == 0, result.stderr[-4000:]
    return read_metrics(out / "metrics.jsonl")


def weight_error(one: Path, other: Path) -> float:
    """Relative distance of two runs' final weights."""
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    difference = sum((a[name] - b[name]).square().sum() for name in a)
    return (difference / sum(weight.square().sum() for weight in a.values())).sqrt().item()


def without_clock(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "tokens_per_s"}
        for row in rows
    ]
