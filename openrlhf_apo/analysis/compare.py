"""A comparison from end to end: check every arm, prepare, run what is not finished, write the results."""

import fcntl
import logging
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from openrlhf_apo.analysis.compare_file import Comparison, check_arms
from openrlhf_apo.analysis.compare_results import write_results
from openrlhf_apo.analysis.compare_runs import Run, run_all
from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.errors import CompareError


def compare(comparison: Comparison, jobs: int) -> str:
    """Do the runs that are not finished, `jobs` at a time, and write results and figures; returns their table.

    Raises CompareError when a setting cannot be used. Everything that can be checked is checked before the first run
    starts; a run that crashes is no error here but a line of the results.
    """
    if jobs > 1 and has_cuda() and not os.environ.get("RAY_ADDRESS"):
        raise CompareError("--jobs above 1 on GPUs needs one Ray for all: `ray start --head`, then RAY_ADDRESS=auto")
    for warning in check_arms(comparison, check_model=False):
        logging.warning(warning)
    runs = comparison.runs()
    _check_runs(runs)
    with _only_one(comparison.output_dir):
        if not all(run.finished for run in runs):
            _prepare(comparison.prepare)
            check_arms(comparison, check_model=True)
            run_all(runs, jobs)
        return write_results(runs, comparison.threshold, comparison.baseline, comparison.output_dir)


def _check_runs(runs: list[Run]) -> None:
    """Refuse a run that an earlier call did, or began, with other flags: its numbers would be those of another arm."""
    for run in runs:
        if change := run.change():
            raise CompareError(
                f"arm {run.arm}, seed {run.seed} was run with other settings ({change}): delete {run.dir}, or change "
                "output_dir"
            )


def _prepare(commands: list[list[str]]) -> None:
    """Run the file's `prepare` commands, such as one that makes the model."""
    for command in commands:
        if command[0] == "python":
            command = [sys.executable, *command[1:]]
        try:
            code = subprocess.run(command).returncode
        except OSError as error:
            raise CompareError(f"prepare: {error}") from None
        if code:
            raise CompareError(f"prepare: exit code {code} from {shlex.join(command)}")


@contextmanager
def _only_one(output_dir: Path):
    """Hold a lock on `output_dir`, which ends with the process, so that a second compare there is refused."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompareError(f"another compare is at work in {output_dir}: wait, or change output_dir") from None
        yield
