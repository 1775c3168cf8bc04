"""Compare objectives: arms x seeds from one file, as a CSV, a table and pictures.

    python -m openrlhf_apo.cli.compare configs/compare/figure1_tiny.yaml [--jobs N]

Every run is a process of openrlhf_apo.cli.train_apo_ray with its log in OUTPUT_DIR/ARM/seed_S/train.log. All arms are
checked before the first one starts. Runs that are finished are skipped and a killed one goes on from its checkpoint,
so the same command continues what was stopped. docs/compare.md describes the file and the columns.

--jobs N runs N at a time. With RAY_ADDRESS set they all join that cluster, and Ray places them; without it each starts
a Ray of its own on this machine, which is for CPUs only.

Exit code 2: a setting cannot be used, and nothing was started; 1: a run crashed; 130: stopped by a signal.
"""

import logging
import signal
import sys

from openrlhf_apo.analysis.compare import compare
from openrlhf_apo.analysis.compare_file import load_comparison
from openrlhf_apo.cli.console import Parser, exit_code
from openrlhf_apo.errors import CompareError
from openrlhf_apo.trainer.metrics import logger as metrics_logger


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m openrlhf_apo.cli.compare", description="Run arms x seeds and compare them.")
    parser.add_argument("file", metavar="FILE.yaml", help="the comparison, such as configs/compare/figure1_tiny.yaml")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; default: the file's, or 1")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be above 0")
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    metrics_logger.setLevel(logging.ERROR)  # it would warn of the line that a run is just writing
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # SIGINT: a shell's background job ignores it
        signal.signal(signum, _interrupt)
    try:
        comparison = load_comparison(args.file)
        table = compare(comparison, args.jobs or comparison.jobs)
        print(f"{table}\nwritten: results.csv, results.md and figure_*.png in {comparison.output_dir}")
        return 0 if all(run.finished for run in comparison.runs()) else 1
    except CompareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(exit_code(main))
