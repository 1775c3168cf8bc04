"""What a run shows while it trains, on a terminal and elsewhere."""

import io
import logging
import re

import pytest

from openrlhf_apo.cli.console import log_to
from openrlhf_apo.trainer.clock import Clock, duration
from openrlhf_apo.trainer.live_view import LiveView

FIRST = {"step": 0, "eval/pass1": 0.25, "time/step": 3.0}
ROWS = [
    {
        **{"step": step, "reward_mean": 0.1 * step, "alpha": 0.9, "confidence": 0.5, "improvement": 0.4, "ess": 0.8},
        **{"rollout_mismatch": 3e-7, "tokens_per_s": 1234.5, "time/step": 2.0 * step},
    }
    for step in (1, 2, 3)
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def our_logger():
    logger = logging.getLogger("openrlhf_apo")
    handlers, level = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], logger.level = handlers, level


def test_elsewhere_than_on_a_terminal_a_rollout_is_a_line():
    stream = io.StringIO()
    with LiveView(stream, 0, 3) as view:
        view.phase("generate")
        for row in (FIRST, *ROWS):
            view.show(row)
    numbers = "α 0.900, c·p 0.200, ESS/P 0.80, mismatch 3.0e-07, 1,234 tokens/s"
    assert stream.getvalue().splitlines() == [
        "rollout 0/3, held-out 0.250, 3.0 s",
        f"rollout 1/3, reward 0.100, {numbers}, 2.0 s, 0 min 4 s left",
        f"rollout 2/3, reward 0.200, {numbers}, 4.0 s, 0 min 3 s left",
        f"rollout 3/3, reward 0.300, {numbers}, 6.0 s",
    ]


def test_a_long_line_is_not_cut():
    stream = io.StringIO()
    with LiveView(stream, 0, 3) as view:
        view.show(ROWS[0] | {"eval/pass1": 0.5, "tokens_per_s": 1e9})
    (line,) = stream.getvalue().splitlines()
    assert len(line) > 100 and line.endswith("left")


def test_on_a_terminal_log_lines_stand_above(our_logger, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    log_to(stream)
    with LiveView(stream, 0, 3) as view:
        with Clock(view.phase)("update"):
            view.show(FIRST)
            view.show(ROWS[0])
            our_logger.warning("a verifier failed")
            view.live.refresh()
        drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
    our_logger.warning("after it")
    assert "a verifier failed" in drawn and "rollout 2/3" in drawn and "update 0 s, 0 min 4 s left" in drawn
    assert "reward 0.100  held-out 0.250  α 0.900" in drawn
    assert stream.getvalue().endswith("after it\n") and stream.getvalue().count("after it") == 1


@pytest.mark.parametrize("seconds, text", [(0.4, "0 min 0 s"), (61, "1 min 1 s"), (3660, "1 h 1 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
