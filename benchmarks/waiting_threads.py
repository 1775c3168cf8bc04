"""How long torch's threads should spin before they sleep: an embedded step alone, and beside a busy program.

    .venv/bin/python benchmarks/waiting_threads.py

A thread that spins is there at once when the next operation starts; where another program wants the core, it is in
the way. Cases are values of libgomp's GOMP_SPINCOUNT, and OMP_WAIT_POLICY=PASSIVE, with which a thread sleeps at once.
The busy program is one that counts. openrlhf_apo/imports.py holds the value that was chosen. Nothing else should
run on the machine; by default more than ten minutes on two cores.
"""

import subprocess
import sys
from unittest import mock

from measure import alternated, make_parser, medians, print_ratios, print_table, ratio, write_json
from workload import WARM_UP, Work, run_product

from openrlhf_apo.imports import SPIN_COUNT

WAITS = {
    f"spin {SPIN_COUNT}": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "spin 100000": {"GOMP_SPINCOUNT": "100000"},
    "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
}
CHOSEN, *OTHERS = WAITS
BESIDE = ("alone", "beside one")


def step(work: Work, wait: dict[str, str], busy: bool) -> dict:
    """A run of `work`, whose threads wait in this way."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        with mock.patch.dict("os.environ", wait):
            return run_product(work, ["--runtime", "embedded", "--loss", "apo"])
    finally:
        if other is not None:
            other.kill()
            other.wait()


def cases(steps: int) -> dict:
    """{"WAIT, BESIDE": run}."""
    work = Work(steps=steps)
    return {
        f"{name}, {beside}": lambda wait=wait, beside=beside: step(work, wait, busy=beside != BESIDE[0])
        for name, wait in WAITS.items()
        for beside in BESIDE
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=12, help=f"rollouts of a run; the first {WARM_UP} are warm-up")
    args = parser.parse_args()
    measurements = alternated(cases(args.steps), args.runs)
    middle = medians(measurements)
    keys = ("step_s", "generate_s", "update_s")
    rows = [[case, *(values[key] for key in keys)] for case, values in middle.items()]
    print_table(["case", "step, s", "generate, s", "update, s"], rows)
    found = {
        f"{beside}: step_s over {other}": ratio(
            middle[f"{CHOSEN}, {beside}"]["step_s"], middle[f"{other}, {beside}"]["step_s"], "lower"
        )
        for beside in BESIDE
        for other in OTHERS
    }
    print_ratios(found, {})
    write_json(args.json, "waiting_threads", measurements, found)


if __name__ == "__main__":
    main()
