"""The report of runs: the picture as a file, for a single run also a page, and for each run its closing table."""

from pathlib import Path
from statistics import fmean

from openrlhf_apo.analysis.report_figure import build_figure
from openrlhf_apo.analysis.report_page import page
from openrlhf_apo.trainer.clock import duration
from openrlhf_apo.trainer.metrics import first_and_last_fifth, held_out, read_metrics


def load_run(run_dir) -> list[dict]:
    """The rows of RUN_DIR/metrics.jsonl; ValueError when there are none."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give the output directory of a run")
    rows = read_metrics(path)
    if not rows:
        raise ValueError(f"{path} is empty: the run has not finished a step")
    return rows


def save_report(run_dirs: list, out) -> None:
    """Draw the runs into the PNG file `out`, creating its directory; of a single run write the page beside it."""
    dirs = [Path(run_dir).resolve() for run_dir in run_dirs]
    names = [path.name for path in dirs]
    if len(set(names)) < len(names):
        names = [str(path) for path in dirs]
    runs = dict(zip(names, map(load_run, dirs), strict=True))
    figure, _ = build_figure(runs)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    if len(dirs) == 1:
        content = page(names[0], dirs[0], runs[names[0]], out.read_bytes(), summary(run_dirs[0]))
        out.with_suffix(".html").write_text(content, encoding="utf-8")


def summary(run_dir) -> str:
    """The closing table of a run: what it gained, how long it took, where its files are.

    "First" and "last" of the sampled reward are means over the first and the last fifth of the steps; of the
    held-out one, the first and the last evaluation.
    """
    rows = load_run(run_dir)
    trained = [row for row in rows if "reward_mean" in row]
    rewards = [row["reward_mean"] for row in trained]
    key, evaluated = held_out(rows)
    alphas = [row["alpha"] for row in rows if "alpha" in row]
    seconds = [row["time/step"] for row in rows if "time/step" in row]
    step_seconds = [row["time/step"] for row in trained if "time/step" in row]
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]

    lines = [f"{'':<16} {'first':>8} {'last':>8} {'change':>8}"]
    if rewards:
        first, last, fifth = first_and_last_fifth(rewards)
        lines.append(_comparison("sampled reward", first, last, f"mean over {fifth} of {len(rewards)} steps"))
    if evaluated:
        (start, first), (end, last) = evaluated[0], evaluated[-1]
        steps = f"steps {start} and {end}" if len(evaluated) > 1 else f"step {start} only"
        name = "held-out pass@1" if key == "eval/pass1" else "held-out score"
        lines.append(_comparison(name, first, last, f"after {steps}"))
    if alphas:
        lines.append(f"{'α':<16} {alphas[0]:>8.3f} {alphas[-1]:>8.3f} {alphas[-1] - alphas[0]:>+8.3f}")
    lines.append("")
    if seconds:
        per_step = f", {fmean(step_seconds):.2f} s per step" if step_seconds else ""
        lines.append(f"{'time':<16} {duration(sum(seconds))}{per_step}")
    if speeds:
        lines.append(f"{'speed':<16} {fmean(speeds):,.0f} tokens/s")
    run_dir = Path(run_dir)
    if (run_dir / "config.json").exists():  # Hugging Face's; OpenRLHF saves it into the output directory itself
        lines.append(f"{'checkpoint':<16} {run_dir}")
    for label, path in (("metrics", run_dir / "metrics.jsonl"), ("picture", run_dir / "report.png")):
        if path.exists():
            lines.append(f"{label:<16} {path}")
    return "\n".join(lines)


def _comparison(label: str, first: float, last: float, note: str) -> str:
    return f"{label:<16} {first:>8.3f} {last:>8.3f} {last - first:>+8.3f}   {note}"
