"""A laptop's run: `--runtime embedded --loss apo` against TRL's GRPOTrainer, on the same work.

    .venv/bin/python benchmarks/laptop.py

A rollout of 16 prompts x 8 answers, 16 + 32 tokens, one optimizer step on it; fp32, no KL, torch's AdamW, random
weights of two sizes, a reward that costs nothing (workload.py). `same`: both train on micro-batches of 16. `best`:
this trainer by its defaults against the faster of TRL's micro-batches of 16 and all 128 answers at once; no gradient
checkpointing in either. tokens/s counts response tokens over the whole step. TRL lives in an environment of its own,
.cache/trl, which is made the first time by pip (torch 2.13.0, the CPU build where the index has one; TORCH_INDEX_URL
names another index).
"""

import os
import shutil
import subprocess
import sys
import venv

from measure import CACHE, ROOT, alternated, make_parser, medians, print_ratios, print_table, ratio, write_json
from workload import SIZES, WARM_UP, Work, make_model, observe, run_product, write_inputs

TRL = ROOT / ".cache" / "trl"
# The libraries below both trainers have the versions of requirements/cpu.txt, so that trainers are compared.
PINS = ("trl==1.16.0", "transformers==5.15.0", "accelerate==1.15.0", "datasets==5.2.0")
TORCH = "torch==2.13.0"
SAME = 16  # answers of a micro-batch
AIMS = {"tokens_per_s": ">= 1.25", "first_step_s": "", "pss_gb": ""}


def trl_python() -> str:
    """The interpreter of TRL's environment, which is made where there is none."""
    python, done = TRL / "bin" / "python", TRL / "installed"
    if not done.exists() or done.read_text() != " ".join([TORCH, *PINS]):
        print(f"installing {PINS[0]} into {TRL} ...", file=sys.stderr, flush=True)
        venv.create(TRL, with_pip=True)
        index = os.environ.get("TORCH_INDEX_URL")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH, *(["--index-url", index] if index else [])], check=True)
        subprocess.run([*pip, *PINS], check=True)
        done.write_text(" ".join([TORCH, *PINS]))
    return str(python)


def run_trl(work: Work, micro_batch: int) -> dict:
    out = CACHE / "run_trl"
    shutil.rmtree(out, ignore_errors=True)
    (out / "output").mkdir(parents=True)
    prompts, reward = write_inputs(out, work)
    command = [trl_python(), str(ROOT / "benchmarks" / "trl_worker.py")]
    settings = {
        "model": make_model(work.size),
        "prompts": prompts,
        "reward": reward,
        "out": out / "output",
        "per_rollout": work.prompts,
        "group": work.group,
        "response_tokens": work.response_tokens,
        "micro_batch": micro_batch,
        "steps": work.steps,
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    return observe(command, out / "output" / "metrics.jsonl", work)


def cases(sizes: list[str], steps: int) -> dict:
    """{"SIZE TRAINER by MICRO-BATCH": run}."""
    found = {}
    for size in sizes:
        work = Work(size, steps=steps)
        embedded = ["--runtime", "embedded", "--loss", "apo"]
        flags = {SAME: [*embedded, "--train.micro_batch_size", str(SAME)], "default": embedded}
        for by, ours in flags.items():
            found[f"{size} apo by {by}"] = lambda work=work, ours=ours: run_product(work, ours)
        for by in (SAME, work.prompts * work.group):
            found[f"{size} trl by {by}"] = lambda work=work, by=by: run_trl(work, by)
    return found


def ratios(middle: dict[str, dict], sizes: list[str]) -> dict[str, dict]:
    """This trainer over TRL."""
    found = {}
    for size in sizes:
        theirs = [values for case, values in middle.items() if case.startswith(f"{size} trl")]
        best = max(theirs, key=lambda values: values["tokens_per_s"])
        pairs = {"same": (middle[f"{size} apo by {SAME}"], middle[f"{size} trl by {SAME}"])}
        pairs["best"] = (middle[f"{size} apo by default"], best)
        for name, (mine, other) in pairs.items():
            found[f"{size} {name}: tokens_per_s"] = ratio(mine["tokens_per_s"], other["tokens_per_s"], "higher")
            for key in ("first_step_s", "pss_gb"):
                found[f"{size} {name}: {key}"] = ratio(mine[key], other[key], "lower")
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=20, help=f"rollouts of a run; the first {WARM_UP} are warm-up")
    args = parser.parse_args()
    trl_python()
    measurements = alternated(cases(args.sizes, args.steps), args.runs)
    middle = medians(measurements)
    keys = ("tokens_per_s", "step_s", "generate_s", "update_s", "first_step_s", "pss_gb")
    header = ["case", "tokens/s", "step, s", "generate, s", "update, s", "launch to step 1, s", "peak PSS, GB"]
    print_table(header, [[case, *(values[key] for key in keys)] for case, values in middle.items()])
    found = ratios(middle, args.sizes)
    print_ratios(found, AIMS)
    print("aims of this trainer's own: launch to step 1 <= 5 s, peak PSS <= 0.7 GB")
    write_json(args.json, "laptop", measurements, found, trl=[TORCH, *PINS])


if __name__ == "__main__":
    main()
