"""What sampling beside training gains: a step of `--train.async_enable` against one without, on Ray.

    .venv/bin/python benchmarks/async_gain.py

The work of laptop.py with `--runtime ray`, four optimizer updates per rollout, so that there is training to sample
beside. `weights` and `engine` are --apo.old_log_probs: where the log-probs of the policy that sampled come from.
"""

from measure import alternated, make_parser, medians, print_ratios, print_table, ratio, write_json
from workload import SIZES, WARM_UP, Work, run_product

PLAIN = "one after the other"
ASYNC = {
    PLAIN: [],
    "beside, weights": ["--train.async_enable"],
    "beside, engine": ["--train.async_enable", "--apo.old_log_probs", "engine"],
}


def cases(size: str, steps: int) -> dict:
    """{HOW: run}."""
    work = Work(size, updates=4, steps=steps)
    return {
        name: lambda flags=flags: run_product(work, ["--runtime", "ray", "--loss", "apo", *flags])
        for name, flags in ASYNC.items()
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.92M")
    parser.add_argument("--steps", type=int, default=20, help=f"rollouts of a run; the first {WARM_UP} are warm-up")
    args = parser.parse_args()
    measurements = alternated(cases(args.size, args.steps), args.runs)
    middle = medians(measurements)
    keys = ("step_s", "generate_s", "update_s")
    rows = [[case, *(values[key] for key in keys)] for case, values in middle.items()]
    print_table(["case", "step, s", "waiting for samples, s", "update, s"], rows)
    found = {
        f"{name}: step_s": ratio(values["step_s"], middle[PLAIN]["step_s"], "lower")
        for name, values in middle.items()
        if name != PLAIN
    }
    print_ratios(found, {})
    write_json(args.json, "async_gain", measurements, found)


if __name__ == "__main__":
    main()
