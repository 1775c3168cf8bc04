"""What a person sees of a run: our own lines. What its libraries print goes to a file that is named at the start."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from tqdm import tqdm

READER_LEFT = 141  # what a shell has for a command that SIGPIPE ended
FORMAT = {"fmt": "%(asctime)s %(message)s", "datefmt": "%H:%M:%S"}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an argument, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help says more\n")


def exit_code(main: Callable[[], int]) -> int:
    """That of a command. Where whoever reads its output has left (`| head`), it ends without a word, as Unix tools
    do."""
    try:
        try:
            code = main()
        except SystemExit as stopped:  # --help
            code = stopped.code or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where Python flushes the rest to when it ends
        return READER_LEFT


class _Lines(logging.StreamHandler):
    def __init__(self, stream: TextIO | None):
        super().__init__(stream)
        self.follows = stream is None  # what stderr is at the time

    def emit(self, record: logging.LogRecord) -> None:
        file = sys.stderr if self.follows else self.stream
        tqdm.write(self.format(record), file=file)  # above a progress bar, and not through it


def log_to(stream: TextIO | None) -> None:
    """Our log lines, and nobody else's, on `stream`; None is what stderr is at the time."""
    ours = logging.getLogger("openrlhf_apo")
    for handler in ours.handlers[:]:
        ours.removeHandler(handler)
    handler = _Lines(stream)
    handler.setFormatter(logging.Formatter(**FORMAT))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


def divert_output(path: str) -> TextIO:
    """Append all that this process and its libraries write to stdout and stderr to the file `path`, in Python or below
    it, together with every log line. Returns what stderr was, for us; our log lines go there, too."""
    console = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    sys.stdout.flush()
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr, force=True)
    logging.captureWarnings(True)
    log_to(console)
    return console
