"""A laptop's run: `--runtime embedded --loss apo` against TRL's GRPOTrainer, on the same work.

    .venv/bin/python benchmarks/laptop.py

A rollout of 16 prompts x 8 answers, 16 + 32 tokens, one optimizer step on it; fp32, no KL, torch's AdamW, random
weights of two sizes, a reward that costs nothing (workload.py). `same`: both train on micro-batches of 16. `best`: TRL
trains on all 128 answers at once, without gradient checkpointing in either, and this trainer by its defaults. tokens/s
counts response tokens over the whole step. TRL lives in an environment of its own, .cache/trl, which is made the first
time by pip (torch 2.13.0, the CPU build where the index has one; TORCH_INDEX_URL names another index).
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


def cases(sizes: list[str], modes: list[str], steps: int) -> dict:
    """{"SIZE MODE TRAINER": run}."""
    found = {}
    for size in sizes:
        work = Work(size, steps=steps)
        answers = work.prompts * work.group
        for mode in modes:
            ours, theirs = (["--train.micro_batch_size", str(SAME)], SAME) if mode == "same" else ([], answers)
            flags = ["--runtime", "embedded", "--loss", "apo", *ours]
            found[f"{size} {mode} apo"] = lambda work=work, flags=flags: run_product(work, flags)
            found[f"{size} {mode} trl"] = lambda work=work, theirs=theirs: run_trl(work, theirs)
    return found


def ratios(middle: dict[str, dict]) -> dict[str, dict]:
    """This trainer over TRL."""
    found = {}
    for name, ours in middle.items():
        if name.endswith(" apo"):
            pair, theirs = name.removesuffix(" apo"), middle[name.removesuffix("apo") + "trl"]
            found[f"{pair}: tokens_per_s"] = ratio(ours["tokens_per_s"], theirs["tokens_per_s"], "higher")
            for key in ("first_step_s", "pss_gb"):
                found[f"{pair}: {key}"] = ratio(ours[key], theirs[key], "lower")
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=("same", "best"), default=["same", "best"])
    parser.add_argument("--steps", type=int, default=20, help=f"rollouts of a run; the first {WARM_UP} are warm-up")
    args = parser.parse_args()
    trl_python()
    measurements = alternated(cases(args.sizes, args.modes, args.steps), args.runs)
    middle = medians(measurements)
    keys = ("tokens_per_s", "step_s", "generate_s", "update_s", "first_step_s", "pss_gb")
    header = ["case", "tokens/s", "step, s", "generate, s", "update, s", "launch to step 1, s", "peak PSS, GB"]
    print_table(header, [[case, *(values[key] for key in keys)] for case, values in middle.items()])
    found = ratios(middle)
    print_ratios(found, AIMS)
    print("aims of this trainer's own: launch to step 1 <= 5 s, peak PSS <= 0.7 GB")
    write_json(args.json, "laptop", measurements, found, trl=[TORCH, *PINS])


if __name__ == "__main__":
    main()
