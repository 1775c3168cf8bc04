"""What a person sees while a run trains: on a terminal two lines that are drawn over, elsewhere a line per rollout."""

import logging
import statistics
import time
from typing import TextIO

from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openrlhf_apo.trainer.clock import duration

RECENT = 20  # rollouts, whose median says how long the rest will take
# What is shown of a row of metrics.jsonl, as far as it is there.
NUMBERS = {
    "reward_mean": "reward {:.3f}",
    "eval/pass1": "held-out {:.3f}",
    "eval/score_mean": "held-out {:.3f}",
    "alpha": "α {:.3f}",
    "guard": "c·p {:.3f}",
    "ess": "ESS/P {:.2f}",
    "rollout_mismatch": "mismatch {:.1e}",
    "tokens_per_s": "{:,.0f} tokens/s",
}


class LiveView:
    """`with LiveView(...) as view`, then `phase(name)` as a phase begins and `show(row)` after each rollout.

    done, total: rollouts. While it draws on a terminal, our log lines go above it.
    """

    def __init__(self, stream: TextIO, done: int, total: int):
        self.console = Console(file=stream, force_jupyter=False, highlight=False, soft_wrap=True)
        self.done, self.total = done, total
        self.numbers: dict[str, str] = {}
        self.seconds: list[float] = []
        self.name, self.since = "", time.monotonic()
        self.live = Live(get_renderable=self._lines, console=self.console, transient=True)
        self.moved: list[tuple[logging.StreamHandler, TextIO]] = []

    def __enter__(self) -> "LiveView":
        if self.console.is_terminal:
            for handler in logging.getLogger("openrlhf_apo").handlers:
                if isinstance(handler, logging.StreamHandler):
                    self.moved.append((handler, handler.stream))
                    handler.setStream(FileProxy(self.console, handler.stream))
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        for handler, stream in self.moved:
            handler.setStream(stream)

    def phase(self, name: str) -> None:
        self.name, self.since = name, time.monotonic()

    def show(self, row: dict) -> None:
        """row: of metrics.jsonl; that before the first rollout has only held-out numbers."""
        if "confidence" in row and "improvement" in row:
            row = row | {"guard": row["confidence"] * row["improvement"]}
        numbers = {key: text.format(row[key]) for key, text in NUMBERS.items() if key in row}
        self.numbers |= numbers
        self.done = row["step"]
        if self.done > 0:
            self.seconds = [*self.seconds[1 - RECENT :], row["time/step"]]
        if not self.console.is_terminal:
            place = [
                f"rollout {self.done}/{self.total}",
                *numbers.values(),
                f"{row['time/step']:.1f} s",
                *self._left(),
            ]
            self.console.print(", ".join(place))

    def _left(self) -> list[str]:
        """How long the rest takes, if it is known and there is one."""
        if not self.seconds or self.done == self.total:
            return []
        return [f"{duration(statistics.median(self.seconds) * (self.total - self.done))} left"]

    def _lines(self) -> Group:
        first = Table.grid(padding=(0, 1))
        place = f"rollout {min(self.done + 1, self.total)}/{self.total}"
        phase = f"{self.name} {time.monotonic() - self.since:.0f} s" if self.name else "starting"
        first.add_row(place, ProgressBar(self.total, self.done, width=24), ", ".join([phase, *self._left()]))
        return Group(first, Text("  ".join(self.numbers[key] for key in NUMBERS if key in self.numbers)))
