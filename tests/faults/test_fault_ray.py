"""Processes of a Ray run that die: it ends with one line and nothing of it stays, or goes on by its budget."""

import signal
import subprocess
import time

import psutil
import pytest
from real_runs import without_clock
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


def test_an_engine_and_then_the_policy_die_and_the_run_goes_on(long, tmp_path):
    budget = ["--rollout.max_engine_restarts", "1", "--train.max_restarts", "1"]
    process = start([*long, "--train.num_episodes", "8"], tmp_path, *SAVED, *budget, runtime="ray")
    wait_for_rows(process, tmp_path, 2)
    kill(process, "ray::RolloutActor")
    wait_for_rows(process, tmp_path, 5)
    kill(process, "ray::PolicyActor")
    code, lines = end(process, 240)
    assert code == 0, lines[-5:]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert {row["restarts"] for row in rows} == {0, 1} and rows[4]["engine_restarts"] == 1
    assert all(row["rollout_mismatch"] < 1e-3 for row in rows)  # the new engine has the policy's weights


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
