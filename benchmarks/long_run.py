"""Whether a run of 2,000 rollouts stays as it was: memory, open files, threads, processes and speed.

    .venv/bin/python benchmarks/long_run.py --runtime embedded
    .venv/bin/python benchmarks/long_run.py --runtime ray

The tiny model of laptop.py (0.92 M parameters), `--loss apo --alpha_mode guarded`, 8 prompts x 4 answers of 16 tokens,
a checkpoint every 100 rollouts. The processes are looked at every ten seconds. The rollouts from 100 on, once all has
warmed up, are compared with the last ones: `growth` is what the whole tree gained, `slope` its trend per 1,000
rollouts, by least squares over all samples.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from measure import ROOT, make_parser, print_table, ratio, write_json
from workload import Work, product

WARM_UP = 100  # rollouts
WINDOW = 100  # rollouts whose median speed is compared
EVERY = 10.0  # seconds


def look(root: psutil.Process, rollout: int) -> dict:
    """Sums over the tree: PSS [MB], open files, threads, processes; and PSS by process."""
    found = {"rollout": rollout, "pss_mb": 0.0, "files": 0, "threads": 0, "processes": 0, "by_process": {}}
    for process in [root, *root.children(recursive=True)]:
        try:
            with process.oneshot():
                pss = process.memory_full_info().pss / 1e6
                name = " ".join(process.cmdline()[:1]).rsplit("/", 1)[-1].split(".")[0] or process.name()
                found["files"] += process.num_fds()
                found["threads"] += process.num_threads()
        except psutil.Error:  # it ended meanwhile
            continue
        found["pss_mb"] += pss
        found["processes"] += 1
        found["by_process"][f"{name} {process.pid}"] = pss
    return found


def watch(command: list[str], metrics: Path, every: float) -> tuple[list[dict], list[dict]]:
    """(samples of the tree, rows of metrics) of a run to its end."""
    samples = []
    log = metrics.parent.parent / "log.txt"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        while True:
            try:
                process.wait(timeout=every)
                break
            except subprocess.TimeoutExpired:
                rollout = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                samples.append(look(psutil.Process(process.pid), rollout))
                print(f"rollout {rollout}: {samples[-1]['pss_mb']:.0f} MB", end="\r", file=sys.stderr, flush=True)
    if process.returncode != 0:
        raise RuntimeError(f"exit code {process.returncode}, see {log}")
    return samples, [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]


def summary(samples: list[dict], rows: list[dict]) -> dict[str, dict[str, float]]:
    """{quantity: {"early", "late", "growth" [share], "slope" [per 1,000 rollouts, share of early]}}."""
    warm = [sample for sample in samples if WARM_UP <= sample["rollout"] < len(rows)] or samples
    tenth = max(1, len(warm) // 10)
    found = {}
    for key in ("pss_mb", "files", "threads", "processes"):
        early = statistics.median(sample[key] for sample in warm[:tenth])
        late = statistics.median(sample[key] for sample in warm[-tenth:])
        found[key] = {"early": early, "late": late, "growth": late / early - 1}
        if len({sample["rollout"] for sample in warm}) > 1:
            fit = statistics.linear_regression([s["rollout"] for s in warm], [s[key] for s in warm])
            found[key]["slope"] = 1000 * fit.slope / early
    steps = [row["time/step"] for row in rows]
    early = statistics.median(steps[WARM_UP : WARM_UP + WINDOW] or steps)
    late = statistics.median(steps[-WINDOW:])
    found["step_s"] = {"early": early, "late": late, "growth": late / early - 1}
    return found


def main() -> None:
    parser = make_parser(__doc__, runs=None)
    parser.add_argument("--runtime", choices=("embedded", "ray"), default="embedded")
    parser.add_argument("--rollouts", type=int, default=2000)
    args = parser.parse_args()
    work = Work(prompts=8, group=4, response_tokens=16, steps=args.rollouts)
    flags = ["--runtime", args.runtime, "--loss", "apo", "--alpha_mode", "guarded", "--ckpt.save_steps", "100"]
    start = time.perf_counter()
    samples, rows = watch(*product(work, flags), EVERY if args.rollouts > WARM_UP else 0.5)
    found = summary(samples, rows)
    header = ["quantity", "early", "late", "growth, %", "slope, % per 1,000 rollouts"]
    table = [[key, v["early"], v["late"], 100 * v["growth"], 100 * v.get("slope", 0.0)] for key, v in found.items()]
    print_table(header, table)
    print(f"\n{len(rows)} rollouts in {time.perf_counter() - start:,.0f} s, {args.runtime}")
    ratios = {
        f"{args.runtime}: {key}, late over early": ratio(v["late"], v["early"], "lower") for key, v in found.items()
    }
    samples = [{"case": args.runtime} | sample for sample in samples]
    write_json(args.json, "long_run", samples, ratios, summary=found, steps_s=[row["time/step"] for row in rows])


if __name__ == "__main__":
    main()
