"""Runs of the real stack, by the command that a user types; `start` has an interpreter of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import forked
import psutil
from safetensors.torch import load_file

from openrlhf_apo.trainer.metrics import read_metrics

MODULE = ["-m", "openrlhf_apo.cli.train_apo_ray"]
FIRST_IS_A_DIGIT = "float(query[len(prompt):][:1].isdigit())"
# In the form of OpenRLHF's example: some turns, feedback between them, a reward that is drawn.
AGENT = """
import asyncio
import random

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor


class AgentInstance(AgentInstanceBase):
    def __init__(self, *args, **kwargs):
        self.step_idx = 0

    async def reset(self, states: dict, **kwargs):
        return {"observation": states["observation"]}

    async def step(self, states: dict, **kwargs):
        await asyncio.sleep(random.random() / 100)
        done = self.step_idx >= int(states["label"]) % 3
        reward = torch.tensor(sum(c.isdigit() for c in states["action_text"]) / 16)
        self.step_idx += 1
        return {
            "rewards": reward,
            "scores": reward,
            "environment_feedback": "12 " if done else " = 9\\n",
            "done": done,
            "sampling_params": states.get("sampling_params", None),
            "extra_logs": {"turns": torch.tensor(self.step_idx)},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(AgentInstance)
"""
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
    with TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = forked.start(command, *said, dict(os.environ))
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, process.exitcode, *(path.read_text() for path in said))


def succeed(flags: list[str], out: Path, *more: str, runtime: str = "ray") -> list[dict]:
    result = train(flags, out, *more, runtime=runtime)
    assert result.returncode == 0, result.stderr[-4000:]
    return read_metrics(out / "metrics.jsonl")


def weight_error(one: Path, other: Path, file: str = "model.safetensors") -> float:
    """Relative distance of two runs' final weights."""
    a, b = (load_file(path / file) for path in (one, other))
    difference = sum((a[name] - b[name]).square().sum() for name in a)
    return (difference / sum(weight.square().sum() for weight in a.values())).sqrt().item()


def without_clock(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "tokens_per_s"}
        for row in rows
    ]


def start(flags: list[str], out: Path, *more: str, runtime: str = "embedded") -> subprocess.Popen:
    where = ["--runtime", runtime, "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt")]
    return subprocess.Popen([sys.executable, *MODULE, *flags, *where, *more], stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, path: Path, rows: int = 0, seconds: float = 120) -> None:
    """Until the run has written the file, with so many lines."""
    ends = time.monotonic() + seconds
    while not (path.exists() and path.read_bytes().count(b"\n") >= rows):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < ends
        time.sleep(0.02)


def wait_for_rows(process: subprocess.Popen, out: Path, rows: int) -> None:
    wait_for(process, out / "metrics.jsonl", rows)


def kill(run: subprocess.Popen, name: str) -> None:
    """SIGKILL to a process of the run. Ray renames a worker with every call, and at times it has no name."""
    ends = time.monotonic() + 30
    while time.monotonic() < ends:
        for each in psutil.Process(run.pid).children(recursive=True):
            if name in " ".join(each.cmdline()[:2]):
                each.kill()
                return
        time.sleep(0.01)
    raise AssertionError(f"the run has no process {name}")


def end(process: subprocess.Popen, seconds: float = 120) -> tuple[int, list[str]]:
    """Exit code and lines of what the run said; nothing of it is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    _, said = process.communicate(timeout=seconds)
    _, alive = psutil.wait_procs(children, timeout=seconds)  # agents of a Ray that was killed may take a minute
    alive = [each.cmdline()[:3] for each in alive if each.status() != psutil.STATUS_ZOMBIE]
    assert not alive, alive
    return process.returncode, said.strip().splitlines()
