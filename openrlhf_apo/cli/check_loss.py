"""Check the group losses of one's own file before training with them.

    python -m openrlhf_apo.cli.check_loss my_loss.py

Runs every loss the file registers on random groups and prints what it finds; docs/own_loss.md explains the lines.
Exit code 2, with one `error:` line: the file or a loss in it cannot be trained with.
"""

import argparse
import sys

from openrlhf_apo.errors import LossError
from openrlhf_apo.objectives import load_losses
from openrlhf_apo.objectives.loss_checks import CHECKS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m openrlhf_apo.cli.check_loss", description="Check the group losses of a file."
    )
    parser.add_argument("file", metavar="FILE.py", help="registers its losses with @group_loss")
    args = parser.parse_args(argv)
    try:
        for name in load_losses(args.file):
            print(name)
            for label, check in CHECKS.items():
                print(f"  {label:<26}{check(name)}", flush=True)
    except LossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
