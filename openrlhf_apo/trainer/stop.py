"""SIGTERM, Ctrl-C and SLURM's SIGUSR1 ask a run to end: it leaves a checkpoint. Asked twice, it ends at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SECONDS = 1.0  # in which a second signal is the first one, come by another way


class Stopped(KeyboardInterrupt):
    """The run was asked to end. A KeyboardInterrupt, since nothing between here and its handler takes that for a
    failure of its own (asyncio, Ray, a reward function)."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Raises Stopped in the main thread, at once, or at the end of what is held together.

    with StopSignals() as stop: ... Without `with`, or in another thread, it is never asked. descriptor: of the file
    where it says that it was.
    """

    def __init__(self, descriptor: int = 2):
        self.descriptor, self.received, self._held = descriptor, 0, False
        self.since = 0.0
        self._before: dict = {}

    def install(self) -> None:
        """Also again, after a library has put handlers of its own in place."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            before = signal.signal(signum, self._handle)
            self._before.setdefault(signum, before)

    def __enter__(self) -> "StopSignals":
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def held(self, held: bool = True) -> Iterator[None]:
        """What is inside is not interrupted: what changes the policy, and a checkpoint. held=False, inside of that:
        this may be interrupted all the same."""
        before, self._held = self._held, held
        try:
            self.check()
            yield
        finally:
            self._held = before

    def check(self) -> None:
        """Raise Stopped where the run was asked to end and nothing is held."""
        if self.received and not self._held:
            raise Stopped(self.received)

    def _handle(self, signum: int, _: object) -> None:
        name = signal.Signals(signum).name
        if self.received and time.monotonic() - self.since < SAME_SECONDS:
            return  # sent to the whole process group and passed on by `timeout` or a script, too
        if self.received:
            self._say(f"{name} again: ending at once\n")
            os._exit(128 + signum)
        self.received, self.since = signum, time.monotonic()
        self._say(f"{name}: the run ends with a checkpoint; once more, and it ends without\n")
        self.check()

    def _say(self, line: str) -> None:
        # Past the buffer of stderr, in which the main thread may be at this moment.
        os.write(self.descriptor, f"\n{line}".encode())
