"""What run.json (trainer/run_record.py) says of a command line."""

import shlex
from collections.abc import Sequence
from types import SimpleNamespace

from openrlhf_apo import cpu
from openrlhf_apo.options.manifest import flat
from openrlhf_apo.options.owners import owners
from openrlhf_apo.settings import settings_of
from openrlhf_apo.trainer.hidden import SECRET, hide_in_addresses, hide_key

# Beside those that losses, controllers and the rest own: what changes the step, by prefix.
OF_THE_LOSS = ("actor.dual_clip", "actor.entropy_coef", "actor.eps_clip", "adrpo.", "algo.", "guidance.", "loss_path")
NOT_SETTINGS = ("config", "dry_run", "given", "local_rank")


def run_record(args: SimpleNamespace, argv: Sequence[str]) -> dict:
    """JSON-able, without secrets. argv: of the trainer."""
    settings = {flag: value for flag, value in sorted(flat(args).items()) if flag not in NOT_SETTINGS}
    if settings[SECRET]:
        settings[SECRET] = "(not shown)"
    owned = {owner.flag(each) for owner in owners() for each in settings_of(owner.cls)}
    return {
        "command": command_of(argv),
        "runtime": args.runtime,
        "device": "cuda" if cpu.has_cuda() else "cpu",
        "seed": args.train.seed,
        "given": {
            flag: {"value": settings[flag], "from": origin} for flag, origin in args.given.items() if flag in settings
        },
        "given_to_the_loss": {
            flag: settings[flag] for flag in args.given if flag in owned or flag.startswith(OF_THE_LOSS)
        },
        "settings": settings,
    }


def command_of(argv: Sequence[str]) -> str:
    return hide_in_addresses(hide_key(shlex.join(["python", "-m", "openrlhf_apo.cli.train_apo_ray", *argv])))
