"""Compare objectives: arms x seeds from one file, as a CSV, a table and pictures.

    python -m openrlhf_apo.cli.compare configs/compare/figure1_tiny.yaml [--jobs N]

Every run is a process of openrlhf_apo.cli.train_apo_ray with its log in OUTPUT_DIR/ARM/seed_S/train.log. All arms are
checked before the first one starts. Runs that are finished are skipped and a killed one goes on from its checkpoint,
so the same command continues what was stopped. docs/compare.md describes the file and the columns.

--jobs N runs N at a time. With RAY_ADDRESS set they all join that cluster, and Ray places them; without it each starts
a Ray of its own on this machine, which is for CPUs only.

Exit code 2: a setting cannot be used, and nothing was started; 1: a run crashed; 130: stopped by a signal.
"""

import argparse
import fcntl
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from openrlhf_apo.analysis.compare_results import write_results
from openrlhf_apo.analysis.compare_runs import Run, run_all
from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.options.settings import OptionError, flatten, resolve, start_up_warnings

KEYS = ("output_dir", "seeds", "config", "flags", "arms", "prepare", "threshold", "jobs")
OWN_FLAGS = ("train.seed", "ckpt.output_dir", "ckpt.path", "ckpt.load_enable", "config", "dry_run")


class CompareError(ValueError):
    """The comparison cannot be made; the message is one line for the user and names the fix."""


@dataclass(frozen=True)
class Comparison:
    """A comparison file. `arms` holds each arm's trainer flags as command-line words, without seed and directories."""

    output_dir: Path
    seeds: list[int]
    arms: dict[str, list[str]]
    prepare: list[list[str]]
    threshold: float | None
    jobs: int

    def runs(self) -> list[Run]:
        """Seed by seed, so that every arm has a run early."""
        return [Run(self.output_dir, arm, seed, words) for seed in self.seeds for arm, words in self.arms.items()]


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise CompareError(f"{twice[0]!r} comes twice (line {node.start_mark.line + 1} and below): rename one")
        return super().construct_mapping(node, deep)


def load_comparison(path) -> Comparison:
    """Read a comparison file. Raises CompareError when it cannot be used; flags are not checked yet."""
    content = _read_yaml(path)
    if unknown := content.keys() - set(KEYS):
        raise CompareError(f"unknown key {sorted(map(str, unknown))[0]!r}; known are {', '.join(KEYS)}")
    seeds, arms = content.get("seeds"), content.get("arms")
    if not isinstance(content.get("output_dir"), str):
        raise CompareError("output_dir is missing: the folder for runs and results")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise CompareError("seeds must be a list of integers, such as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise CompareError(f"seeds {seeds}: one comes twice")
    if not isinstance(arms, dict) or not arms:
        raise CompareError("arms is missing: `name: {flag: value}` for each")
    for arm in arms:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", str(arm), re.ASCII):
            raise CompareError(f"arm {arm!r}: its name is a folder's: use letters, digits, _ and -")
    threshold, jobs = content.get("threshold"), content.get("jobs", 1)
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise CompareError(f"threshold {threshold!r}: must be a reward, such as 0.65")
    if type(jobs) is not int or jobs < 1:
        raise CompareError(f"jobs {jobs!r}: must be an integer above 0")
    prepare = content.get("prepare") or []
    if not isinstance(prepare, list) or not all(isinstance(command, str | list) and command for command in prepare):
        raise CompareError("prepare must be a list of commands, each a string or a list of words")

    base = _read_yaml(content["config"]) if content.get("config") else {}
    common = {name: value for name, value in flatten(base).items() if name not in OWN_FLAGS}
    common |= _flags(content.get("flags"), "flags")
    return Comparison(
        output_dir=Path(content["output_dir"]),
        seeds=seeds,
        arms={str(arm): _words(common | _flags(flags, f"arm {arm}")) for arm, flags in arms.items()},
        prepare=[
            shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
            for command in prepare
        ],
        threshold=threshold,
        jobs=jobs,
    )


def _read_yaml(path) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except CompareError as error:
        raise CompareError(f"{path}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CompareError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise CompareError(f"{path}: expected `key: value` lines")
    return content


def _flags(tree, where: str) -> dict:
    if not isinstance(tree or {}, dict):
        raise CompareError(f"{where}: expected `flag: value` lines")
    flat = flatten(tree or {})
    for name in OWN_FLAGS:
        if name in flat:
            raise CompareError(f"{where}: {name} is set by compare itself: drop it")
    return flat


def _words(flags: dict) -> list[str]:
    """The command line of {flag: value}: true is a switch; false and null leave out what `config` or `flags` set."""
    words = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return words


def check_arms(comparison: Comparison, check_model: bool) -> list[str]:
    """The warnings of all arms. Raises CompareError, naming the arm, when one cannot run."""
    warnings = []
    for run in comparison.runs()[: len(comparison.arms)]:  # the first seed's: others differ only in the seed
        try:
            settings = resolve(run.argv, check_model)
        except OptionError as error:
            raise CompareError(f"arm {run.arm}: {error}") from None
        warnings += [f"arm {run.arm}: {warning}" for warning in start_up_warnings(settings)]
    return warnings


def _check_runs(runs: list[Run]) -> None:
    for run in runs:
        if change := run.change():
            raise CompareError(
                f"arm {run.arm}, seed {run.seed} was run with other settings ({change}): delete {run.dir}, or change "
                "output_dir"
            )


def _prepare(commands: list[list[str]]) -> None:
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
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompareError(f"another compare is at work in {output_dir}: wait, or change output_dir") from None
        yield


def compare(path, jobs: int | None = None) -> bool:
    """Run what is not finished and write the results; whether every run has finished. Raises CompareError."""
    comparison = load_comparison(path)
    jobs = jobs or comparison.jobs
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
        table = write_results(runs, comparison.threshold, comparison.output_dir)
    print(f"{table}\nwritten: results.csv, results.md and figure_*.png in {comparison.output_dir}")
    return all(run.finished for run in runs)


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m openrlhf_apo.cli.compare", description="Run arms x seeds and compare them."
    )
    parser.add_argument("file", metavar="FILE.yaml", help="the comparison, such as configs/compare/figure1_tiny.yaml")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: the file's, or 1")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be above 0")
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    logging.getLogger("openrlhf_apo.trainer.metrics").setLevel(logging.ERROR)  # of a line being written right now
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT: a shell's background job ignores it
        signal.signal(signum, _interrupt)
    try:
        return 0 if compare(args.file, args.jobs) else 1
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
