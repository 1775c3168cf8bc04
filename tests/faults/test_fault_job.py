"""A job that is asked to end, killed, started twice, or has nowhere to write."""

import io
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from outcome import outcome
from real_runs import start, wait_for_rows, without_clock

from openrlhf_apo.alpha import AlphaSignals
from openrlhf_apo.errors import OptionError, ProcessDied, RunError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.trainer.checkpoint_folder import complete_checkpoints
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.output_lock import lock_outputs
from openrlhf_apo.trainer.stop import Stopped, StopSignals

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SLOW_REWARD = """
import time
def reward_func(queries, prompts, labels, **kwargs):
    time.sleep(0.05)
    return {"rewards": [float(len(queries[0]) % 5)]}
"""


@pytest.fixture(scope="module")
def slow(short, tmp_path_factory) -> list[str]:
    """A run that takes long enough to be met by a signal in the middle of a rollout."""
    path = tmp_path_factory.mktemp("reward") / "slow.py"
    path.write_text(SLOW_REWARD)
    return [*short, "--reward.remote_url", str(path), "--train.num_episodes", "3"]


@pytest.fixture(scope="module")
def uninterrupted(slow, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("uninterrupted")
    process = start(slow, out)  # in a process of its own, as what it is compared with: as many threads
    process.communicate(timeout=120)
    assert process.returncode == 0
    return without_clock(read_metrics(out / "metrics.jsonl"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_run_that_is_asked_to_end_keeps_all_that_was_trained(slow, uninterrupted, tmp_path, signum):
    process = start(slow, tmp_path)
    wait_for_rows(process, tmp_path, 2)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    lines = said.strip().splitlines()
    assert lines[-1] == f"error: stopped by {signum.name}" and "Traceback" not in said
    newest = complete_checkpoints(tmp_path / "ckpt" / "_actor")[0]
    assert newest.rollout == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] >= 2
    assert f"all up to rollout {newest.rollout} is kept" in lines[-2]
    command = lines[-2].split("from there: ")[1]
    resumed = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert without_clock(read_metrics(tmp_path / "metrics.jsonl")) == uninterrupted


def test_asked_twice_it_ends_at_once_and_it_listened_nowhere(short, tmp_path):
    reward = tmp_path / "hangs.py"
    trial = "{'rewards': [0.0]} if queries[0] == prompts[0] + labels[0]"
    reward.write_text(
        f"import time\ndef reward_func(queries, prompts, labels):\n    return {trial} else time.sleep(600)\n"
    )
    process = start(short, tmp_path / "out", "--reward.remote_url", str(reward))
    log = tmp_path / "out" / "run.log"
    while not (log.exists() and b"optimizer steps in all" in log.read_bytes()):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    run = psutil.Process(process.pid)
    sockets = [socket for each in [run, *run.children(recursive=True)] for socket in each.net_connections("inet")]
    assert [socket for socket in sockets if socket.status == psutil.CONN_LISTEN] == []
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and not list((tmp_path / "out" / "ckpt").glob("_actor/*"))


def test_a_signal_waits_for_what_is_held():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done = True
            with pytest.raises(Stopped), stop.held(False):
                raise AssertionError("not reached")
        assert done
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_runs_in_one_directory_are_refused(short, tmp_path):
    locks = lock_outputs({"--ckpt.output_dir": str(tmp_path)})
    with pytest.raises(OptionError, match=rf"is in use by another run \(process {os.getpid()}\)"):
        lock_outputs({"--ckpt.path": str(tmp_path)})
    code, error = outcome(short, tmp_path)
    assert code == 2 and "is in use by another run" in error
    for lock in locks:
        lock.close()
    here = {"--ckpt.output_dir": str(tmp_path), "--ckpt.path": f"{tmp_path}/."}
    lock_outputs(here)[0].close()  # a run may keep all in one directory


def test_a_directory_for_checkpoints_goes_again_where_there_were_none(tmp_path):
    (tmp_path / "there").mkdir()
    folders = {"--ckpt.output_dir": str(tmp_path / "there"), "--ckpt.path": str(tmp_path / "ckpt" / "checkpoints")}
    for lock in lock_outputs(folders):
        lock.close()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    locks = lock_outputs(folders)
    (tmp_path / "ckpt" / "checkpoints" / "_actor").mkdir()
    for lock in locks:
        lock.close()
    assert (tmp_path / "ckpt" / "checkpoints" / "_actor").is_dir()


def test_a_directory_that_cannot_be_written_is_refused(short, tmp_path):
    (tmp_path / "file").write_text("")
    for directory in ("/proc/apo", str(tmp_path / "file" / "below")):
        code, error = outcome(short, Path(directory))
        assert code == 2 and "give a directory that can be written" in error, error


def test_a_ray_address_where_nobody_answers_is_named(monkeypatch):
    from openrlhf_apo.cluster.start import refuse_silent

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
    with pytest.raises(RunError, match=f"no Ray head answers at RAY_ADDRESS {address}"):
        refuse_silent(address)
    refuse_silent("auto")


def test_a_restart_before_the_first_checkpoint_has_learned_nothing(short, monkeypatch):
    from openrlhf_apo.cluster import start

    alphas = []

    def train(plan, *_):
        controller = plan.objective.controller
        alphas.append(controller.state_dict())
        controller.step(AlphaSignals(0.5, 0.9, None, None))
        if len(alphas) < 3:
            raise ProcessDied("a rank died")

    monkeypatch.setattr(start, "import_module", lambda name: SimpleNamespace(train=train))
    monkeypatch.setattr(start, "start_ray", lambda *_: None)
    args = resolve([*short, "--train.max_restarts", "2", "--runtime", "ray"])
    start.train(run_plan(args), args, io.StringIO(), StopSignals())
    assert alphas[0] == alphas[1] == alphas[2]
