"""The pool: workers that no call can hang, exhaust or outlive."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from openrlhf_apo.rewards.math_verify import grade_many
from openrlhf_apo.rewards.pool import ORPHAN_GRACE, WorkerPool

ROOT = Path(__file__).parent.parent

PID = "__import__('os').getpid()"
SLEEP = "__import__('time').sleep(600)"
HANG = "sum(range(10**15))"  # C code that holds the interpreter: no Python signal handler or thread gets a turn
DEATHS = {
    "exit": "__import__('os')._exit(0)",
    "segfault": "__import__('ctypes').string_at(0)",
    "memory": "bytearray(8 * 2**30)",
}


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def seconds_until_gone(pid, limit):
    start = time.monotonic()
    while running(pid) and time.monotonic() - start < limit:
        time.sleep(0.02)
    assert not running(pid), f"process {pid} is alive {limit} s later"
    return time.monotonic() - start


@pytest.fixture
def pool():
    with WorkerPool("builtins:eval", workers=1, memory_gb=1) as pool:
        yield pool


def test_outcomes(pool):
    assert pool.call("6 * 7", timeout=10) == (42, "ok")
    assert pool.call("1 / 0", timeout=10) == (None, "error")
    assert pool.call("{1, 2}", timeout=10) == (None, "error")  # not JSON
    assert pool.call(SLEEP, timeout=0.2) == (None, "timeout")
    assert pool.call(DEATHS["exit"], timeout=10) == (None, "crash")


def test_a_worker_serves_many_calls_and_starts_when_first_needed():
    with WorkerPool("builtins:eval", workers=8) as pool:
        assert len({pool.call(PID, timeout=10).value for _ in range(5)}) == 1


def test_workers_can_start_before_the_first_call():
    with WorkerPool("builtins:eval", workers=2) as pool:
        pool.start()
        started = {child.pid for child in psutil.Process().children()}
        pool.start()
        assert {child.pid for child in psutil.Process().children()} == started
        assert {pool.call(PID, timeout=10).value for _ in range(5)} <= started


@pytest.mark.parametrize("hang", [SLEEP, HANG])
def test_a_hung_worker_is_killed_at_the_limit_and_replaced(pool, hang):
    pid = pool.call(PID, timeout=10).value
    start = time.monotonic()
    assert pool.call(hang, timeout=0.5).outcome == "timeout"
    assert 0.5 <= time.monotonic() - start < 2
    assert not running(pid)
    assert pool.call("6 * 7", timeout=10) == (42, "ok")


@pytest.mark.parametrize("death", DEATHS.values(), ids=DEATHS)
def test_a_dead_worker_is_replaced(pool, death):
    assert pool.call(death, timeout=10).outcome == "crash"
    assert pool.call("6 * 7", timeout=10) == (42, "ok")


def test_a_worker_killed_from_outside_mid_flight_costs_one_call(pool):
    pid = pool.call(PID, timeout=10).value
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    start = time.monotonic()
    assert pool.call(SLEEP, timeout=30).outcome == "crash"
    assert time.monotonic() - start < 5
    assert pool.call("6 * 7", timeout=10) == (42, "ok")


def test_a_worker_that_died_idle_costs_nothing(pool):
    pid = pool.call(PID, timeout=10).value
    os.kill(pid, signal.SIGKILL)
    seconds_until_gone(pid, 5)
    assert pool.call("6 * 7", timeout=10) == (42, "ok")


def test_one_slow_call_takes_no_time_from_its_neighbours():
    with WorkerPool("builtins:eval", workers=2) as pool:
        results = pool.map([(SLEEP,)] + [(f"{i} + 1",) for i in range(50)], timeout=1)
    assert [result.outcome for result in results] == ["timeout"] + ["ok"] * 50
    assert [result.value for result in results[1:]] == list(range(1, 51))


@pytest.mark.parametrize("function", ["no.such.module:f", "builtins:no_such_name"])
def test_a_function_that_cannot_be_imported_is_an_error_not_a_score(function):
    with WorkerPool(function) as pool, pytest.raises(RuntimeError, match=f"{function} could not start: .*Error"):
        pool.call(timeout=10)


def test_close_ends_the_workers_and_refuses_further_calls():
    pool = WorkerPool("builtins:eval", workers=1)
    pid = pool.call(PID, timeout=10).value
    pool.close()
    assert not running(pid)
    with pytest.raises(RuntimeError, match="closed"):
        pool.call("1", timeout=1)


def test_bad_settings():
    with pytest.raises(ValueError, match="workers must be at least 1"):
        WorkerPool("builtins:eval", workers=0)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        WorkerPool("builtins:eval").call("1", timeout=0)


@pytest.mark.parametrize("busy", [None, HANG], ids=["idle", "hung"])
def test_no_worker_outlives_a_parent_that_is_sigkilled(busy):
    script = f"""
from openrlhf_apo.rewards.pool import WorkerPool
pool = WorkerPool("builtins:eval", workers=1)
print(pool.call({PID!r}, timeout=60).value, flush=True)
pool.call({busy!r}, timeout=1) if {busy!r} else __import__("time").sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert running(pid)
        parent.kill()
    gone = seconds_until_gone(pid, 1 + ORPHAN_GRACE + 5)
    if busy:
        assert gone > 1, "it was not hung, so this test showed nothing"


@pytest.mark.slow
def test_in_a_ray_actor():
    ray = pytest.importorskip("ray")

    @ray.remote(max_concurrency=4)
    class Engine:
        """Nothing but the calls that a rollout engine would make."""

        def score(self, text):
            return grade_many([text], ["18"], timeout=3.0)[0].score

        def worker_pid(self):
            self.pool = WorkerPool("builtins:eval", workers=1)
            return self.pool.call(PID, timeout=30).value

    ray.init("local", num_cpus=1, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        engine = Engine.remote()
        texts = [r"\boxed{18}", r"\boxed{99999999!}", r"\boxed{19}", r"\boxed{18}"]
        assert ray.get([engine.score.remote(text) for text in texts], timeout=120) == [1.0, 0.0, 0.0, 1.0]
        pid = ray.get(engine.worker_pid.remote(), timeout=60)
        assert running(pid)
        ray.kill(engine)
        seconds_until_gone(pid, 10)
    finally:
        ray.shutdown()
