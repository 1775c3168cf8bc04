"""How long the phases of a rollout take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase since the last `lap`. on_phase: is told of each as it begins."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self.on_phase = on_phase
        self.phases: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.on_phase:
            self.on_phase(phase)
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """{"time/PHASE": seconds}, and the whole as "time/step"."""
        now = time.perf_counter()
        times = {f"time/{phase}": seconds for phase, seconds in self.phases.items()} | {"time/step": now - self.start}
        self.phases, self.start = {}, now
        return times


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
