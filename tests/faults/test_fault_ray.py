"""Processes of a Ray run that die: it ends with one line and nothing of it stays, or goes on by its budget."""

import signal
import subprocess
import time
from ipaddress import ip_address

import psutil
import pytest
from real_runs import succeed, weight_error, without_clock
from test_fault_job import start, wait_for_rows

from openrlhf_apo.trainer.checkpoint_folder import complete_checkpoints
from openrlhf_apo.trainer.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SAVED = ["--ckpt.save_steps", "1"]


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


def end(process, seconds: float = 120) -> tuple[int, list[str]]:
    """Exit code and lines of what the run said; nothing of it is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    _, said = process.communicate(timeout=seconds)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    return process.returncode, said.strip().splitlines()


@pytest.fixture(scope="module")
def long(short) -> list[str]:
    return [*short, "--train.num_episodes", "4"]


@pytest.mark.parametrize("victim", ["ray::PolicyActor", "raylet"])
def test_a_dead_part_ends_the_run_with_one_line_and_the_way_on(long, tmp_path, victim):
    process = start(long, tmp_path, *SAVED, runtime="ray")
    wait_for_rows(process, tmp_path, 2)
    kill(process, victim)
    code, lines = end(process)
    assert code == 1 and lines[-1].startswith("error: ") and "died" in lines[-1], lines[-3:]
    assert "goes on from there" in lines[-2] and not any(line.startswith("Traceback") for line in lines)


def listening(process: subprocess.Popen) -> dict[str, list[str]]:
    """Addresses that the run's processes listen on, by process."""
    found = {}
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        addresses = [socket.laddr.ip for socket in each.net_connections("inet") if socket.status == "LISTEN"]
        found |= {f"{each.name()} {each.pid}": addresses} if addresses else {}
    return found


def test_nothing_of_a_run_on_this_machine_listens_beyond_loopback(long, tmp_path):
    """Two ranks, so that torch's store and gloo listen too. The embedded runtime opens no port: test_fault_job.py."""
    process = start(long, tmp_path, "--actor.num_gpus_per_node", "2", runtime="ray")
    wait_for_rows(process, tmp_path, 2)
    found = listening(process)
    process.send_signal(signal.SIGTERM)
    end(process)
    names = " ".join(found)
    assert "gcs_server" in names and "raylet" in names and "ray::Policy" in names, found  # it can fail
    beyond = {
        name: addresses
        for name, addresses in found.items()
        if any(not ip_address(each.removeprefix("::ffff:")).is_loopback for each in addresses)
    }
    assert beyond == {}


MORTAL = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from openrlhf_apo.objectives import TokenLoss, token_loss


def may_die(place):
    order = Path(__file__).parent / f"{place}-{os.environ.get('RANK')}"
    if order.exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


@token_loss("mortal")
@dataclass(eq=False)
class Mortal(TokenLoss):
    aggregation = "sequence"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        if "MORTAL" not in os.environ:  # once in each process; Ray brings the class, and does not import this file
            os.environ["MORTAL"] = "1"
            register_optimizer_step_pre_hook(lambda *_: may_die("optimizer"))
        may_die("forward")
        if log_probs.requires_grad:
            log_probs.register_hook(lambda gradient: may_die("backward"))
        return -log_probs * advantages, torch.zeros_like(mask, dtype=torch.bool)
"""


def test_ranks_killed_in_the_middle_of_a_step_cost_no_more_than_that_step(long, training_flags, tmp_path):
    """One of two, in its forward, its backward and its optimizer step. From saved rollouts, so that no engine has to
    start again, and the result is that of the embedded run that made them."""
    loss, straight, out = tmp_path / "mortal.py", tmp_path / "straight", tmp_path / "out"
    loss.write_text(MORTAL)
    mine, saved = ["--loss_path", str(loss), "--loss", "mortal"], str(tmp_path / "rollouts")
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


def test_sigterm_under_ray_leaves_a_checkpoint_and_a_killed_driver_the_one_before(long, tmp_path):
    process = start(long, tmp_path, runtime="ray")
    wait_for_rows(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    code, lines = end(process)
    assert code == 143 and lines[-1] == "error: stopped by SIGTERM", lines[-5:]
    kept = complete_checkpoints(tmp_path / "ckpt" / "_actor")[0].rollout
    assert kept == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]

    process = start(long, tmp_path, *SAVED, "--ckpt.load_enable", runtime="ray")
    wait_for_rows(process, tmp_path, kept + 2)
    process.kill()
    process.communicate(timeout=60)
    process = start(long, tmp_path, *SAVED, "--ckpt.load_enable", runtime="ray")
    assert end(process)[0] == 0
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    straight = tmp_path / "straight"
    process = start(long, straight, runtime="ray")
    assert end(process)[0] == 0
    assert without_clock(rows) == without_clock(read_metrics(straight / "metrics.jsonl"))
