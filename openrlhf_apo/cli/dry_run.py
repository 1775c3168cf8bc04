"""`--dry_run`: what a run would stop at before it starts, and what it would be."""

import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

from openrlhf_apo.data.inputs import make_tokenizer, read_inputs
from openrlhf_apo.errors import OptionError, RewardFailure
from openrlhf_apo.options.owners import value_of
from openrlhf_apo.rewards.reward import Answer, RewardFunction
from openrlhf_apo.rewards.weighted import WeightedReward
from openrlhf_apo.trainer.hidden import SECRET
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.prompts import PromptRow


def dry_run(plan: RunPlan, args: SimpleNamespace) -> None:
    """Read the data, call a reward file once, and print the given settings, the run's sizes and all settings.

    Raises DataError or OptionError, one line, as the run would.
    """
    with redirect_stdout(sys.stderr):  # what libraries and the reward print
        inputs = read_inputs(plan, args, make_tokenizer(args), lambda sequences: [])  # a reward model is not asked
        if inputs.prompts is not None:
            _try_reward_files(plan, inputs.scorer.reward, inputs.prompts.rows[0])
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


def _try_reward_files(plan: RunPlan, reward: RewardFunction, row: PromptRow) -> None:
    """Call each file once, with a row's prompt and its label as the answer."""
    response = str(row.label)  # such as an answer may be
    parts = plan.reward.parts
    functions = (
        [part for part, _ in reward.parts.values()] if isinstance(reward, WeightedReward) else [reward] * len(parts)
    )
    for part, function in zip(parts, functions, strict=True):
        if part.urls is None or not part.is_file:
            continue
        (found,) = function([Answer(row.text, response, row.label)], 0)
        if isinstance(found, RewardFailure):
            raise OptionError(
                f"the reward {part.urls[0]}: for the first row the reward {found} (prompt {row.text[-80:]!r}, "
                f"response {response!r}, label {row.label!r})"
            )


def _print_settings(args: SimpleNamespace, prefix: str = "") -> None:
    for name, value in sorted(vars(args).items()):
        if hasattr(value, "__dict__"):
            _print_settings(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("given", "config", "dry_run", "local_rank"):
            print(f"{prefix}{name}: {_shown(prefix + name, value)}")


def _shown(flag: str, value: object) -> object:
    return "(not shown)" if value and flag == SECRET else value
