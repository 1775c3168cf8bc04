"""Check the losses of your own file before training with them.

    python -m openrlhf_apo.cli.check_loss my_loss.py

Runs every loss that the file registers, group and token losses, on random data, and prints what it finds.
docs/own_loss.md explains the lines. Exit code 2, with one `error:` line: the file or a loss in it cannot be trained
with.
"""

import sys
from collections.abc import Callable

from openrlhf_apo.cli.console import Parser, exit_code
from openrlhf_apo.errors import LossError
from openrlhf_apo.objectives import TOKEN_LOSSES, Terms
from openrlhf_apo.objectives.checking import group_checks, token_checks
from openrlhf_apo.options.own_file import load_own_file


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m openrlhf_apo.cli.check_loss", description="Check the losses of a file.")
    parser.add_argument("file", metavar="FILE.py", help="registers its losses with @group_loss or @token_loss")
    args = parser.parse_args(argv)
    try:
        losses = load_own_file(args.file).losses
        if not losses:
            raise LossError(f"{args.file} registers no loss: there is nothing to check")
        for name in losses:
            print(name)
            for label, check in _checks(name).items():
                print(f"  {label:<26}{check(name)}", flush=True)
    except LossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _checks(name: str) -> dict[str, Callable[[str], str]]:
    if name not in TOKEN_LOSSES:
        return group_checks.CHECKS
    return token_checks.CHECKS | {"ranks": lambda name: token_checks.check_travel(name, _travel)}


def _travel(terms: Terms) -> Terms:
    """As Ray sends them to another process."""
    from ray import cloudpickle  # 1 s, and for token losses only: group losses stay on the driver

    return cloudpickle.loads(cloudpickle.dumps(terms))


if __name__ == "__main__":
    sys.exit(exit_code(main))
