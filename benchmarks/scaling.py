"""How an embedded run's step grows with prompts, group size and response length.

    .venv/bin/python benchmarks/scaling.py

The tiny model of laptop.py (0.92 M parameters), `--loss apo`, one optimizer step per rollout. One axis at a time from
16 prompts x 8 answers x 64 tokens: prompts 16 to 256, P 4 to 64, length 64 to 1,024. For each: the split of a step,
the exponent of its seconds in the size by a fit of logarithms (1 is linear), and the size from which the next doubling
costs more than 2^1.15.
"""

from measure import alternated, bend, exponent, make_parser, medians, print_table, ratio, write_json
from workload import Work, run_product

AXES = {
    "prompts": (16, 32, 64, 128, 256),
    "group": (4, 8, 16, 32, 64),
    "response_tokens": (64, 128, 256, 512, 1024),
}
PHASES = ("step_s", "generate_s", "update_s")
BASE = {"prompts": 16, "group": 8, "response_tokens": 64}


def name_of(axis: str, size: int) -> str:
    return f"{axis} {size}"


def fits(middle: dict[str, dict], axes: dict[str, list[int]]) -> dict[str, dict]:
    """{axis: {phase: {"exponent", "bends_at"}}}."""
    found: dict[str, dict] = {}
    for axis, sizes in axes.items():
        for phase in PHASES:
            seconds = [middle[name_of(axis, size)][phase] for size in sizes]
            fit = {"exponent": exponent(sizes, seconds), "bends_at": bend(sizes, seconds)}
            found.setdefault(axis, {})[phase] = fit
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--points", type=int, default=5, help="of each axis, from the smallest")
    parser.add_argument("--steps", type=int, default=6, help="rollouts of a run; the first 3 are warm-up")
    args = parser.parse_args()
    if not 2 <= args.points <= 5:
        parser.error("--points: from 2 to 5, a fit takes two")
    axes = {axis: list(AXES[axis][: args.points]) for axis in args.axes}
    flags = ["--runtime", "embedded", "--loss", "apo"]
    calls = {}
    for axis, sizes in axes.items():
        for size in sizes:
            work = Work(steps=args.steps, **(BASE | {axis: size}))
            calls[name_of(axis, size)] = lambda work=work: run_product(work, flags)
    measurements = alternated(calls, args.runs)
    middle = medians(measurements)
    keys = (*PHASES, "tokens_per_s", "pss_gb")
    header = ["case", "step, s", "generate, s", "update, s", "tokens/s", "peak PSS, GB"]
    print_table(header, [[case, *(values[key] for key in keys)] for case, values in middle.items()])
    fitted, found = fits(middle, axes), {}
    print()
    for axis, phases in fitted.items():
        for phase, fit in phases.items():
            at = f"bends upwards at {fit['bends_at']}" if fit["bends_at"] else "does not bend upwards"
            print(f"{axis}: {phase} grows with exponent {fit['exponent']:.2f}, {at}")
        found[f"{axis}: exponent of step_s"] = ratio(phases["step_s"]["exponent"], 1.0, "lower")
    write_json(args.json, "scaling", measurements, found, fits=fitted)


if __name__ == "__main__":
    main()
