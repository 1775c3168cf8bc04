"""One machine under Ray: how long a step and the start take, and the update against OpenRLHF's own.

    .venv/bin/python benchmarks/ray_one_machine.py

The work of laptop.py at 0.92 M parameters with `--runtime ray`: Ray, DeepSpeed and vLLM, without a GPU where there is
none. `apo` and `openrlhf` (OpenRLHF's experience maker and PPO step as they are, `--rollout.micro_batch_size 16`)
train with 1 and with 4 optimizer updates per rollout, both on micro-batches of 16; their ratio is that of time/update.
`apo by default` cuts by its own budget of tokens, which upstream has with flash-attn only.
"""

from measure import alternated, make_parser, medians, print_ratios, print_table, ratio, write_json
from workload import SIZES, WARM_UP, Work, run_product

MICRO_BATCH = "16"
CUT = ["--train.micro_batch_size", MICRO_BATCH]
FLAGS = {
    "apo": ["--loss", "apo", *CUT],
    "apo by default": ["--loss", "apo"],
    "openrlhf": [
        *("--loss", "openrlhf", "--algo.advantage.estimator", "group_norm", "--algo.kl.init_coef", "0"),
        *(*CUT, "--rollout.micro_batch_size", MICRO_BATCH),
    ],
}
AIMS = {"1 update(s) apo: update_s": "<= 0.6", "4 update(s) apo: update_s": "<= 0.9"}


def cases(size: str, updates: list[int], steps: int) -> dict:
    """{"N update(s) LOSS": run}."""
    found = {}
    for count in updates:
        work = Work(size, updates=count, steps=steps)
        for loss, flags in FLAGS.items():
            flags = ["--runtime", "ray", *flags]
            found[f"{count} update(s) {loss}"] = lambda work=work, flags=flags: run_product(work, flags)
    return found


def ratios(middle: dict[str, dict]) -> dict[str, dict]:
    """Each apo over openrlhf."""
    found = {}
    for name, ours in middle.items():
        updates, _, loss = name.partition(" apo")
        if name != f"{updates} openrlhf":
            theirs = middle[f"{updates} openrlhf"]
            found |= {f"{name}: {key}": ratio(ours[key], theirs[key], "lower") for key in ("update_s", "step_s")}
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="0.92M")
    parser.add_argument("--updates", nargs="+", type=int, default=[1, 4], help="optimizer updates per rollout")
    parser.add_argument("--steps", type=int, default=20, help=f"rollouts of a run; the first {WARM_UP} are warm-up")
    args = parser.parse_args()
    measurements = alternated(cases(args.size, args.updates, args.steps), args.runs)
    middle = medians(measurements)
    keys = ("step_s", "generate_s", "update_s", "tokens_per_s", "first_step_s", "pss_gb")
    header = ["case", "step, s", "generate, s", "update, s", "tokens/s", "launch to step 1, s", "peak PSS, GB"]
    print_table(header, [[case, *(values[key] for key in keys)] for case, values in middle.items()])
    found = ratios(middle)
    print_ratios(found, AIMS)
    print("aims of apo with 1 update: step <= 1.0 s, launch to step 1 <= 12 s, peak PSS <= 2.2 GB")
    write_json(args.json, "ray_one_machine", measurements, found)


if __name__ == "__main__":
    main()
