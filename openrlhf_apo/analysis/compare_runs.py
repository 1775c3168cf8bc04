"""The runs of a comparison: each a process of the trainer, in a directory that says how far the run has come."""

import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from openrlhf_apo.trainer.checkpoint_folder import complete_checkpoints
from openrlhf_apo.trainer.metrics import read_metrics

TRAINER = (sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray")
POLL_SECONDS = 0.5
STOP_SECONDS = 20  # from SIGTERM to SIGKILL
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, eq=False)
class Run:
    """One arm with one seed. Its directory holds metrics.jsonl, train.log and compare.json: flags and how it ended.

    `words` is the trainer's command line without seed and directories.
    """

    output_dir: Path
    arm: str
    seed: int
    words: list[str]

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def dir(self) -> Path:
        return self.output_dir / self.arm / f"seed_{self.seed}"

    @property
    def argv(self) -> list[str]:
        own = {"train.seed": self.seed, "ckpt.output_dir": self.dir, "ckpt.path": self.dir / "ckpt"}
        return self.words + [word for flag, value in own.items() for word in (f"--{flag}", str(value))]

    @property
    def record(self) -> dict:
        """compare.json: `argv`, and once the run has ended `exit_code` and `error`; empty before its start."""
        path = self.dir / "compare.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_record(self, **ending) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        tmp = self.dir / "compare.json.tmp"
        tmp.write_text(json.dumps({"argv": self.argv} | ending, indent=1) + "\n", encoding="utf-8")
        os.replace(tmp, self.dir / "compare.json")

    @property
    def finished(self) -> bool:
        return self.record.get("exit_code") == 0

    @property
    def can_resume(self) -> bool:
        return bool(complete_checkpoints(self.dir / "ckpt" / "_actor"))

    def rows(self) -> list[dict]:
        """The lines of metrics.jsonl; none before the first step."""
        path = self.dir / "metrics.jsonl"
        return read_metrics(path) if path.exists() else []

    def change(self) -> str:
        """The flags that differ from those with which the run finished or could be resumed; empty when none do."""
        record = self.record
        if not record or not (self.finished or self.can_resume):
            return ""
        then, now = _by_flag(record["argv"]), _by_flag(self.argv)
        flags = [flag for flag in {**then, **now} if then.get(flag) != now.get(flag)]
        return ", ".join(f"{flag}: {then.get(flag, 'not set')}, now {now.get(flag, 'not set')}" for flag in flags)


def _by_flag(argv: list[str]) -> dict[str, str]:
    """{flag: its values as one string}; "set" for a switch."""
    by_flag: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            values = by_flag.setdefault(word, [])
        else:
            values.append(word)
    return {flag: " ".join(values) or "set" for flag, values in by_flag.items()}


def run_all(runs: Iterable[Run], jobs: int, trainer: Sequence[str] = TRAINER) -> None:
    """Run what is not finished, `jobs` at a time. One that crashes is recorded and the others go on.

    Whatever ends this function, or this process, ends the processes that it started. Runs beside each other share the
    cores: two programs whose threads wait for one another by spinning take many times as long as two of one thread.
    """
    runs = list(runs)
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = ({"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {}) | os.environ
    waiting = deque(run for run in runs if not run.finished)
    running: dict[Run, subprocess.Popen] = {}
    # On a terminal only: elsewhere the lines of starts and ends say enough.
    with tqdm(
        total=len(runs), initial=len(runs) - len(waiting), unit="run", mininterval=0, dynamic_ncols=True, disable=None
    ) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.popleft()
                    _say(f"{run.name}: {'goes on from its checkpoint' if run.can_resume else 'starts'}")
                    running[run] = _start(run, trainer, environment)
                time.sleep(POLL_SECONDS)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        error = _end(run, process.returncode)
                        count = f"{len(runs) - len(waiting) - len(running)} of {len(runs)}"
                        _say(f"{count}, {run.name}: {f'crashed: {error}' if error else _closing(run.rows())}")
                        bar.update()
                bar.set_postfix_str("; ".join(_progress(run) for run in running))
        finally:
            _stop(list(running.values()))


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _start(run: Run, trainer: Sequence[str], environment: dict[str, str]) -> subprocess.Popen:
    command = [*trainer, *run.argv, *(["--ckpt.load_enable"] if run.can_resume else [])]
    if run.record and not run.can_resume:  # an attempt that ended before its first checkpoint
        (run.dir / "metrics.jsonl").unlink(missing_ok=True)
    run.write_record()
    with open(run.dir / "train.log", "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches compare alone, which then stops the group
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    """A compare that is killed by SIGKILL leaves nothing behind that its next start would run beside."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(run: Run, code: int) -> str:
    """Record how the run ended; what went wrong, or an empty string."""
    error = ""
    if code:
        error = _last_error(run.dir / "train.log") or f"exit code {code}"
        if code < 0:
            error = f"killed by {signal.Signals(-code).name}"
    elif not any("reward_mean" in row for row in run.rows()):
        code, error = 1, "no rollout step in metrics.jsonl"
    if code == 0:
        shutil.rmtree(run.dir / "ckpt", ignore_errors=True)  # was for resuming; the model is in run.dir
    run.write_record(exit_code=code, error=error)
    return error


def _last_error(log: Path) -> str:
    """The last line of the log that starts with `error:`, or else its last line; of the last attempt in the log."""
    attempt = log.read_text(encoding="utf-8", errors="replace").rsplit("\n$ ", 1)[-1]
    lines = [line.strip() for line in re.split(r"[\r\n]+", attempt)[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]


def _stop(processes: list[subprocess.Popen]) -> None:
    """End the processes and their children: SIGTERM, and SIGKILL for what is left after a while."""
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, signum: int) -> None:
    try:
        os.killpg(process.pid, signum)
    except ProcessLookupError:  # the whole group has ended
        pass


def _progress(run: Run) -> str:
    """`apo_ess seed 2: step 7/20 reward 0.610`; the total is what the trainer's line says."""
    trained = [row for row in run.rows() if "reward_mean" in row]
    if not trained:
        return f"{run.name}: starting"
    step = trained[-1]["step"]
    with open(run.dir / "train.log", "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        totals = re.findall(rf"\brollout {step}/(\d+),", log.read().decode(errors="replace"))
    return f"{run.name}: step {step}{f'/{totals[-1]}' if totals else ''} reward {trained[-1]['reward_mean']:.3f}"


def _closing(rows: list[dict]) -> str:
    rewards = [row["reward_mean"] for row in rows if "reward_mean" in row]
    return f"finished, {len(rewards)} steps, reward {rewards[0]:.3f} to {rewards[-1]:.3f}"
