"""`--dry_run`: what a run would stop at before it starts, and what it would be."""

import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

from openrlhf_apo.data.inputs import make_tokenizer, read_inputs
from openrlhf_apo.options.owners import value_of
from openrlhf_apo.trainer.hidden import SECRET
from openrlhf_apo.trainer.plan import RunPlan


def dry_run(plan: RunPlan, args: SimpleNamespace) -> None:
    """Read the data, try the reward, and print the given settings, the run's sizes and all settings.

    Raises DataError or OptionError, one line, as the run would.
    """
    with redirect_stdout(sys.stderr):  # what libraries and the reward print
        inputs = read_inputs(plan, args, make_tokenizer(args), lambda sequences: [])  # a reward model is not asked
    for flag, origin in args.given.items():
        if flag not in ("config", "dry_run"):
            print(f"{flag}: {_shown(flag, value_of(args, flag))}  ({origin})")
    schedule = plan.schedule
    steps = schedule.optimizer_steps([schedule.prompts_per_rollout])
    print(
        f"\n{'at most ' if plan.group_filter else ''}{inputs.rollouts} rollout{'s' * (inputs.rollouts != 1)} x "
        f"{schedule.prompts_per_rollout * schedule.group_size} samples, {steps} optimizer step{'s' * (steps > 1)} "
        f"each, {inputs.optimizer_steps} in all"
    )
    if args.runtime == "ray":
        print(f"placement: {plan.placement}")
    print("\nall settings:")
    _print_settings(args)


def _print_settings(args: SimpleNamespace, prefix: str = "") -> None:
    for name, value in sorted(vars(args).items()):
        if hasattr(value, "__dict__"):
            _print_settings(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("given", "config", "dry_run", "local_rank"):
            print(f"{prefix}{name}: {_shown(prefix + name, value)}")


def _shown(flag: str, value: object) -> object:
    return "(not shown)" if value and flag == SECRET else value
