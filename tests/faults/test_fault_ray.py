"""Processes of a Ray run that die: it ends with one line and nothing of it stays, or goes on by its budget."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from real_runs import end, kill, start, succeed, wait_for_rows, weight_error

from openrlhf_apo.errors import ProcessDied, RunError
from openrlhf_apo.trainer.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SAVED = ["--ckpt.save_steps", "1"]


@pytest.fixture(scope="module")
def long(short) -> list[str]:
    return [*short, "--train.num_episodes", "4"]


MORTAL = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from openrlhf_apo.objectives import TokenLoss, token_loss
from openrlhf_apo.settings import setting


def may_die(place):
    order = Path(__file__).parent / f"{place}-{os.environ.get('RANK')}"
    if order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


@token_loss("mortal")
@dataclass(eq=False)
class Mortal(TokenLoss):
    strength: float = setting(1.0, "a factor", within="(0, 1]")
    aggregation = "sequence"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        if "MORTAL" not in os.environ:  # once in each process; Ray brings the class, and does not import this file
            os.environ["MORTAL"] = "1"
            register_optimizer_step_pre_hook(lambda *_: may_die("optimizer"))
        may_die("forward")
        if log_probs.requires_grad:
            log_probs.register_hook(lambda gradient: may_die("backward"))
        return -self.strength * log_probs * advantages, torch.zeros_like(mask, dtype=torch.bool)
"""


def test_ranks_killed_in_the_middle_of_a_step_cost_no_more_than_that_step(long, training_flags, tmp_path):
    """One of two, in its forward, its backward and its optimizer step. From saved rollouts, so that no engine has to
    start again, and the result is that of the embedded run that made them."""
    loss, straight, out = tmp_path / "mortal.py", tmp_path / "straight", tmp_path / "out"
    loss.write_text(MORTAL)
    mine, saved = ["--loss_path", str(loss), "--mortal.strength", "0.5"], str(tmp_path / "rollouts")
    succeed([*long, *mine, "--apo.save_rollouts", saved], straight, runtime="embedded")
    sizes = ["--rollout.batch_size", "4", "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "16"]
    flags = [*training_flags, *sizes, *mine, "--apo.load_rollouts", saved]
    ranks = ["--actor.num_gpus_per_node", "2", "--train.max_restarts", "3"]
    orders = [tmp_path / name for name in ("forward-1", "backward-0", "optimizer-1")]
    orders[0].touch()
    process = start(flags, out, *SAVED, *ranks, runtime="ray")
    for done, order in enumerate(orders, 1):
        ends = time.monotonic() + 90
        while order.exists():
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.005)
        if order != orders[-1]:
            orders[done].touch()  # they die again in their first step
    code, lines = end(process, 120)
    assert code == 0, lines[-5:]
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9)) and rows[-1]["restarts"] == 3
    assert weight_error(out, straight) < 1e-5


def test_a_rank_whose_peer_died_is_not_what_failed(monkeypatch):
    """Its connection to the dead one breaks, and that can be told first."""
    from ray.exceptions import RayActorError, RayTaskError

    from openrlhf_apo.cluster import calls

    broken = RayTaskError("learn", "the traceback", RuntimeError("Connection reset by peer"), pid=7, ip="127.0.0.1")
    failures = {"rank 0": broken, "rank 1": RayActorError(error_msg="The actor died. pid: 8")}

    def get(ref):
        raise failures[ref]

    monkeypatch.setattr(calls, "_ask_for_head", lambda: None)
    monkeypatch.setattr(
        calls.ray, "wait", lambda refs, timeout, num_returns=1: (refs[:num_returns], refs[num_returns:])
    )
    monkeypatch.setattr(calls.ray, "get", get)
    with pytest.raises(ProcessDied, match=r"^the policy's apply failed, its actor died "):
        calls.get_all(["rank 0", "rank 1"], 100.0, "the policy's apply")
    failures["rank 1"] = broken
    with pytest.raises(RunError, match="Connection reset by peer") as failed:
        calls.get_all(["rank 0", "rank 1"], 100.0, "the policy's apply")
    assert not isinstance(failed.value, ProcessDied)


def test_engines_killed_in_generation_and_in_a_sync_are_replaced(long, tmp_path):
    flags = [*long, "--train.num_episodes", "8", "--rollout.max_engine_restarts", "2"]
    process = start(flags, tmp_path, runtime="ray")
    wait_for_rows(process, tmp_path, 2)
    for method in ("generate", "workers"):  # it receives weights by `workers`
        kill(process, f"ray::RolloutActor.{method}")
        wait_for_rows(process, tmp_path, len(read_metrics(tmp_path / "metrics.jsonl")) + 2)
    code, lines = end(process)
    assert code == 0, lines[-5:]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert {row["engine_restarts"] for row in rows} == {0, 1, 2}
    assert all(row["rollout_mismatch"] < 1e-3 for row in rows)  # a new engine has the policy's weights


def test_an_engine_says_in_one_line_why_it_cannot_start(tiny_model, tmp_path):
    """Three that start side by side: of an architecture that vLLM does not know, without memory for one sequence, and
    with a context that is longer than the model's."""
    unknown = tmp_path / "unknown"
    shutil.copytree(tiny_model, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    script = tmp_path / "engines.py"
    script.write_text(ENGINES)
    found = subprocess.run(
        [sys.executable, script, tiny_model, unknown], capture_output=True, text=True, timeout=240, check=True
    )
    messages = json.loads(found.stdout.splitlines()[-1])
    assert all(message.startswith("an engine failed, ") and "\n" not in message for message in messages), messages
    assert "NoSuchForCausalLM" in messages[0] and "memory" in messages[1].lower(), messages
    assert "max_model_len (100000) is greater" in messages[2], messages


ENGINES = """
import json, sys
from dataclasses import replace

import ray

from openrlhf_apo import cpu

cpu.decide("cpu")
from openrlhf_apo.cluster.calls import get_all
from openrlhf_apo.cluster.engine import EnginePlan, RolloutActor
from openrlhf_apo.errors import RunError

plan = EnginePlan(model=sys.argv[1], count=1, tensor_parallel=1, dtype="fp32", max_len=64, seed=0, eager=True,
                  prefix_caching=False, sleeps=False, gpu_memory_utilization=0.5, trust_remote_code=False, timeout=100,
                  colocated=True, buckets=True)
ray.init(address="local", include_dashboard=False, num_cpus=3, logging_level="error", log_to_driver=False)
settings = [replace(plan, model=sys.argv[2]).vllm_settings(0), plan.vllm_settings(0) | {"kv_cache_memory_bytes": 1000},
            replace(plan, max_len=100_000).vllm_settings(0)]
engines = [ray.remote(RolloutActor).remote(None, 1, each) for each in settings]
messages = []
for engine in engines:
    try:
        get_all([engine.ready.remote()], 200, "an engine")
        messages.append("it started")
    except RunError as error:
        messages.append(str(error))
print(json.dumps(messages))
"""
