"""Train by any objective of this package, or by a loss of your own.

    python -m openrlhf_apo.cli.train_apo_ray --loss apo --alpha_mode guarded \
        --actor.model_name_or_path MODEL --data.prompt_dataset prompts.jsonl --reward math_verify

Takes every flag of `openrlhf.cli.train_ppo_ray` 0.11.2 (docs/openrlhf_flags.md says which has another meaning here)
and those of this package at the end of `--help`. Exit code 2: a setting or the data cannot be used; 1: the run failed;
130, 143: it was asked to end, by Ctrl-C or SIGTERM, and left a checkpoint.
"""

import logging
import os
import shlex
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, TextIO

from openrlhf_apo.cli.console import divert_output, exit_code, log_to
from openrlhf_apo.errors import DataError, GroupError, LossError, OptionError, RunError, in_one_line
from openrlhf_apo.imports import quick_imports
from openrlhf_apo.rewards.math_verify import start_workers
from openrlhf_apo.trainer.checkpoint_folder import complete_checkpoints
from openrlhf_apo.trainer.hidden import hide_key
from openrlhf_apo.trainer.output_lock import lock_outputs
from openrlhf_apo.trainer.stop import Stopped, StopSignals

if TYPE_CHECKING:
    from openrlhf_apo.trainer.plan import OutputPlan, RunPlan

LOG = "run.log"  # in --ckpt.output_dir
RESUME = "--ckpt.load_enable"
logger = logging.getLogger("openrlhf_apo")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    log_to(None)
    with quick_imports():
        from openrlhf_apo.options import resolve, run_plan, start_up_warnings  # imports torch, 1.5 s
    try:
        args = resolve(argv)
        plan = run_plan(args, argv)
        if not args.dry_run:
            output = {"--ckpt.output_dir": plan.output.directory, "--ckpt.path": plan.output.checkpoints}
            locks = lock_outputs(output)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in start_up_warnings(args, plan):
        logger.warning(warning)
    if args.dry_run:
        with quick_imports():
            from openrlhf_apo.cli.dry_run import dry_run
        try:
            dry_run(plan, args)
        except (DataError, OptionError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    path = os.path.join(plan.output.directory, LOG)
    console = divert_output(path)
    logger.info("what the libraries say goes to %s", path)
    try:
        with StopSignals(console.fileno()) as stop:
            code, error = _train(plan, args, console, stop)
    except Stopped as stopped:
        code, error = 128 + stopped.signum, f"stopped by {stopped}"
    if code not in (0, 2) and (last := _last_checkpoint(plan.output)) is not None:
        logger.info("all up to rollout %d is kept; this goes on from there: %s", last, resume_command(argv))
    if error:
        print(f"error: {error}", file=console)
    for lock in locks:
        lock.close()
    return code


def _train(plan: "RunPlan", args: SimpleNamespace, console: TextIO, stop: StopSignals) -> tuple[int, str | None]:
    """-> the exit code, and the one line that says why it is not 0."""
    try:
        if args.runtime == "embedded":
            if any(part.is_math_verify for part in plan.reward.parts):
                start_workers()  # of math_verify; they import while this process does
            with quick_imports():
                from openrlhf_apo.embedded.launch import train  # imports transformers, 2.5 s
        else:
            from openrlhf_apo.cluster.start import train  # imports Ray, DeepSpeed and vLLM
        train(plan, args, console, stop)
    except (DataError, OptionError) as error:
        return 2, str(error)
    except (RunError, LossError, GroupError) as error:
        traceback.print_exc()  # to the log, with what it came from
        return 1, str(error)
    except Exception as error:  # a metric that is not finite, say: the message says which
        traceback.print_exc()
        return 1, f"{in_one_line(error)} (the traceback is in {LOG})"
    return 0, None


def resume_command(argv: list[str]) -> str:
    """For a shell. A key is named and not shown, since this stands in run.log."""
    return hide_key(
        shlex.join([sys.executable, "-m", __spec__.name, *argv, *([RESUME] if argv[-1:] != [RESUME] else [])])
    )


def _last_checkpoint(output: "OutputPlan") -> int | None:
    """The rollout after which the newest checkpoint was written."""
    found = complete_checkpoints(Path(output.checkpoints) / "_actor")
    return found[0].rollout if found else None


if __name__ == "__main__":
    code = exit_code(main)
    sys.stderr.flush()
    os._exit(code)  # the thread of a hung reward function would keep the interpreter waiting for ever
