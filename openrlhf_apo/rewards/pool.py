"""A pool of worker processes that can be killed: it runs a function on untrusted input, each call within a time limit.

A thread cannot be stopped, and `signal.alarm` works in the main thread only and not inside C code that never looks for
signals (`sum(range(10**15))`), so a process is what is left. A call that takes too long has its worker SIGKILLed; a
call that ends its worker (segmentation fault, out of memory, `os._exit`) harms only itself. The next call finds a
fresh worker.
"""

import importlib
import json
import multiprocessing
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

SECRETS = re.compile("token(?!izer)|secret|password|passwd|credential|api_?key|access_?key|wandb", re.IGNORECASE)
START_LIMIT = 120.0  # seconds a worker may take to import its function; a busy machine is slow, a broken one is not
ORPHAN_GRACE = 2.0  # seconds past the time limit after which a worker whose parent has died ends itself


class Result(NamedTuple):
    """What became of one call.

    `outcome` is "ok" (`value` is what the function returned), "error" (it raised), "timeout" (killed at the time
    limit) or "crash" (its worker died). Unless "ok", `value` is None.
    """

    value: Any
    outcome: str


class WorkerPool:
    """Calls `function` in up to `workers` processes. Any number of threads may share a pool.

    function: "package.module:name", importable from the parent's `sys.path`. Its arguments and what it returns
        travel as JSON, so nothing that a worker says is ever unpickled.
    setup: where given, what is called is function(*setup), made once in each worker.
    memory_gb: what a worker may take beside what it has once its function is there (RLIMIT_AS), GiB. A call that needs
        more ends its worker ("crash").

    A worker sees no variable of the environment whose name tells of a secret. What it prints is thrown away.

    Workers start when first needed, or at `start`, and end with the pool, or with the process that owns it, however
    that dies. `counts` holds how many calls had each outcome.
    """

    def __init__(self, function: str, workers: int = 2, memory_gb: float = 2.0, setup: tuple | None = None):
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.function, self.setup = function, setup
        self.workers = workers
        self.memory_bytes = int(memory_gb * 2**30)
        self._closed = False
        # One entry per worker, None where it has to be started. Last in, first out: light use starts one worker only.
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)

    def start(self) -> None:
        """Start every worker that is not running, without waiting until it has imported the function."""
        idle = [self._idle.get() for _ in range(self.workers)]
        for worker in idle:
            self._idle.put(worker or _Worker(self.function, self.memory_bytes, self.setup))

    def wait_until_ready(self) -> None:
        """Until a worker has its function. Raises RuntimeError, with what the worker said, where none can start."""
        worker = self._idle.get()
        try:
            worker = worker or _Worker(self.function, self.memory_bytes, self.setup)
            worker.wait_until_ready()
        finally:
            self._idle.put(worker)

    def call(self, *args, timeout: float) -> Result:
        """`function(*args)` in an idle worker, for at most `timeout` seconds.

        The time to wait for a worker, and to start one, does not count. Raises RuntimeError when no worker can start.
        """
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        worker = self._idle.get()
        keep = False
        try:
            if self._closed:
                raise RuntimeError(f"the worker pool of {self.function} is closed")
            if worker is None or not worker.alive():
                worker = _Worker(self.function, self.memory_bytes, self.setup)
            result = worker.call(args, timeout)
            keep = result.outcome in ("ok", "error")
        finally:
            # Also on KeyboardInterrupt: a worker with an answer still to come must not serve the next call.
            if worker is not None and not keep:
                worker.kill()
                worker = None
            self._idle.put(worker)
        return result

    def map(self, calls: Sequence[tuple], timeout: float) -> list[Result]:
        """`call(*args)` for each args in `calls`, in parallel; results in their order. `timeout` is per call."""
        if len(calls) == 1:
            return [self.call(*calls[0], timeout=timeout)]
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda args: self.call(*args, timeout=timeout), calls))

    def close(self) -> None:
        """Let the calls under way finish, then end the workers. Later calls raise RuntimeError."""
        self._closed = True
        idle = [self._idle.get() for _ in range(self.workers)]
        for worker in idle:
            if worker is not None:
                worker.kill()
            self._idle.put(None)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


_shared: dict[tuple[str, int], WorkerPool] = {}
_shared_lock = threading.Lock()


def shared_pool(function: str, workers: int) -> WorkerPool:
    """This process's pool for (function, workers), made on first use: whoever asks, from any thread, gets the same."""
    with _shared_lock:
        if (function, workers) not in _shared:
            _shared[function, workers] = WorkerPool(function, workers)
        return _shared[function, workers]


class _Worker:
    """The parent's side of one worker process: the process and our end of the socket to it."""

    def __init__(self, function: str, memory_bytes: int, setup: tuple | None):
        self._channel, theirs = multiprocessing.Pipe()
        self._function = function
        self._ready = False
        serve = f"from {__name__} import _serve; _serve({theirs.fileno()}, {function!r}, {memory_bytes}, {setup!r})"
        environment = {name: value for name, value in os.environ.items() if not SECRETS.search(name)}
        # A plain subprocess: multiprocessing would import the user's main script again in every worker.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", serve],
            env={**environment, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()  # so that the worker's death reads as end-of-file here

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def call(self, args: tuple, timeout: float) -> Result:
        self.wait_until_ready()
        request = json.dumps([args, timeout]).encode()
        try:
            self._channel.send_bytes(request)
            if not self._channel.poll(timeout):
                return Result(None, "timeout")
            return Result(*json.loads(self._channel.recv_bytes()))
        except (EOFError, OSError):
            return Result(None, "crash")

    def wait_until_ready(self) -> None:
        if self._ready:
            return
        problem = f"it was not ready after {START_LIMIT:.0f} s"
        try:
            if self._channel.poll(START_LIMIT):
                problem = json.loads(self._channel.recv_bytes())
        except (EOFError, OSError):
            problem = f"it died with exit status {self._process.wait()}"
        if problem:
            raise RuntimeError(f"a worker for {self._function} could not start: {problem}")
        self._ready = True


def _serve(fd: int, function: str, memory_bytes: int, setup: tuple | None) -> None:
    """The worker process: import the function, say so, then answer one request after another until end-of-file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    channel = Connection(fd)
    module, _, name = function.partition(":")
    try:
        target = getattr(importlib.import_module(module), name)
        target = target if setup is None else target(*setup)
    except Exception as error:
        channel.send_bytes(json.dumps(repr(error)).encode())
        return
    with open("/proc/self/statm", encoding="ascii") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    _lower_limit(resource.RLIMIT_AS, taken + memory_bytes)
    _lower_limit(resource.RLIMIT_CORE, 0)
    channel.send_bytes(json.dumps("").encode())

    while True:
        try:
            args, timeout = json.loads(channel.recv_bytes())
        except (EOFError, OSError):
            return  # the parent closed the pool or is dead
        # The parent does the killing. Should it die first, the kernel does: SIGALRM's default action needs no Python.
        signal.setitimer(signal.ITIMER_REAL, timeout + ORPHAN_GRACE)
        try:
            reply = json.dumps([target(*args), "ok"])
        except MemoryError:
            os._exit(1)  # what filled the memory may still be referenced: start afresh
        except Exception:
            reply = json.dumps([None, "error"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        channel.send_bytes(reply.encode())


def _lower_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))
