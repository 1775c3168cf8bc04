"""Train by any objective of this package, or by a loss of your own.

    python -m openrlhf_apo.cli.train_apo_ray --loss apo --alpha_mode guarded \
        --actor.model_name_or_path MODEL --data.prompt_dataset prompts.jsonl --reward math_verify

Takes every flag of `openrlhf.cli.train_ppo_ray` 0.11.2 (docs/openrlhf_flags.md says which has another meaning here)
and those of this package at the end of `--help`. Exit code 2: a setting or the data cannot be used; 1: the run failed.
"""

import logging
import os
import re
import sys
import traceback
from types import SimpleNamespace
from typing import TYPE_CHECKING, TextIO

from openrlhf_apo.cli.console import divert_output, log_to
from openrlhf_apo.cli.imports import quick_imports
from openrlhf_apo.errors import DataError, OptionError, RunError
from openrlhf_apo.rewards.math_verify import start_workers

if TYPE_CHECKING:
    from openrlhf_apo.trainer.plan import RunPlan

LOG = "run.log"  # in --ckpt.output_dir
logger = logging.getLogger("openrlhf_apo")


def main(argv: list[str] | None = None) -> int:
    log_to(None)
    with quick_imports():
        from openrlhf_apo.options import resolve, run_plan, start_up_warnings  # imports torch, 1.5 s
    try:
        args = resolve(sys.argv[1:] if argv is None else argv)
        plan = run_plan(args)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in start_up_warnings(args, plan):
        logger.warning(warning)
    if args.dry_run:
        _print_settings(args)
        return 0
    path = os.path.join(plan.output.directory, LOG)
    console = divert_output(path)
    logger.info("what the libraries say goes to %s", path)
    code, error = _train(plan, args, console)
    if error:
        print(f"error: {error}", file=console)
    return code


def _train(plan: "RunPlan", args: SimpleNamespace, console: TextIO) -> tuple[int, str | None]:
    """-> the exit code, and the one line that says why it is not 0."""
    try:
        if args.runtime == "embedded":
            if plan.reward.urls is None and not plan.saved_rollouts:
                start_workers()  # of math_verify; they import while this process does
            with quick_imports():
                from openrlhf_apo.embedded.launch import train  # imports transformers, 2.5 s
        else:
            from openrlhf_apo.cluster.start import train  # imports Ray, DeepSpeed and vLLM
        train(plan, args, console)
    except (DataError, OptionError) as error:
        return 2, str(error)
    except RunError as error:
        return 1, str(error)
    except Exception as error:  # an actor's, a partial group, a metric that is not finite: the message says which
        traceback.print_exc()
        return 1, f"{_cause(error)} (the traceback is in {LOG})"
    return 0, None


def _cause(error: Exception) -> str:
    """One line; of a failed actor the last exception in what Ray says."""
    if not type(error).__module__.startswith("ray."):
        return f"{type(error).__name__}: {error}"
    lines = str(error).strip().splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*[\w.]*(Error|Exception|Exit)\b.*: ", line)]
    cause = [line.strip() for line in lines[starts[-1] if starts else -1 :] if "For further information" not in line]
    return f"an actor failed: {' '.join(cause)[:500]}"


def _print_settings(args, prefix: str = "") -> None:
    for name, value in sorted(vars(args).items()):
        if hasattr(value, "__dict__"):
            _print_settings(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("given", "config", "dry_run", "local_rank"):
            print(f"{prefix}{name}: {value}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread of a hung reward function would keep the interpreter waiting for ever
