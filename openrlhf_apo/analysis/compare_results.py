"""What a comparison found: results.csv, a row per run; results.md, a row per arm; figures."""

import csv
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

from openrlhf_apo.analysis.compare_figure import build_figures
from openrlhf_apo.analysis.compare_runs import Run
from openrlhf_apo.analysis.compare_statistics import mean_and_half_width, measure, paired_differences

COLUMNS = (
    *("arm", "seed", "status", "error", "steps", "first_reward", "final_reward", "auc", "pass1", "passk", "k"),
    *("score_mean", "steps_to_threshold", "collapsed", "final_entropy", "final_alpha", "guard"),
    *("seconds", "seconds_per_step"),
)
# Of an evaluation, beside its mean: the best of k, different right answers, and the same of each data source.
DIFFERENCES = r"^eval/(?:.*/)?(?:pass\d+|score_\w+|distinct_right)$"


def write_results(runs: list[Run], threshold: float | None, baseline: str | None, output_dir: Path) -> str:
    """Write results.csv, results.md and the figures into `output_dir`; returns the table of results.md."""
    rows_by_run = {run: run.rows() for run in runs}
    results = []
    for run, rows in rows_by_run.items():
        row = {"arm": run.arm, "seed": run.seed, "status": "finished"}
        if run.finished:
            row |= measure(rows, threshold)
        else:
            row |= {"status": "crashed", "error": run.record["error"], "steps": sum("reward_mean" in r for r in rows)}
        results.append(row)
    arms = list(dict.fromkeys(run.arm for run in runs))
    results.sort(key=lambda row: (arms.index(row["arm"]), row["seed"]))
    with open(output_dir / "results.csv", "w", newline="", encoding="utf-8") as file:
        evaluated = sorted({key for row in results for key in row if key.startswith("eval/")})
        writer = csv.DictWriter(file, [*COLUMNS, *evaluated])
        writer.writeheader()
        for row in results:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    table = markdown_table(results, threshold)
    if baseline is not None:
        table += "\n" + differences_table(results, baseline)
    pictures = ""
    for topic, figure in build_figures(rows_by_run).items():
        figure.savefig(output_dir / f"figure_{topic}.png")
        pictures += f"\n![{topic}](figure_{topic}.png)\n"
    (output_dir / "results.md").write_text(f"# {output_dir.name}\n\n{table}{pictures}", encoding="utf-8")
    return table


def markdown_table(results: list[dict], threshold: float | None) -> str:
    """A line per arm, over its finished runs. Below the table: each crashed run with its error; what the columns mean.

    `results` are rows of results.csv, all rows of an arm together.
    """
    by_arm: dict[str, list[dict]] = {}
    for row in results:
        by_arm.setdefault(row["arm"], []).append(row)
    ks = {row["k"] for row in results if "k" in row}
    k = min(ks) if len(ks) == 1 else "k"
    cells: dict[str, Callable[[list[dict]], str]] = {
        "final reward": partial(_interval, "final_reward"),
        "area under the curve": partial(_interval, "auc"),
        "pass@1": partial(_interval, "pass1"),
        f"pass@{k}": partial(_interval, "passk"),
        "held-out score": partial(_interval, "score_mean"),
        f"steps to {threshold}": _reached,
        "collapsed": lambda done: f"{sum(row['collapsed'] for row in done)} of {len(done)}",
        "s / step": partial(_interval, "seconds_per_step"),
    }
    if not any("pass1" in row for row in results):
        del cells["pass@1"]
    if not any("score_mean" in row for row in results):
        del cells["held-out score"]
    if not ks:
        del cells[f"pass@{k}"]
    if threshold is None:
        del cells[f"steps to {threshold}"]
    lines = [table_row(["arm", "runs", *cells]), table_row(["---"] + ["---:"] * (len(cells) + 1))]
    for arm, rows in by_arm.items():
        done = [row for row in rows if row["status"] == "finished"]
        count = str(len(done)) if len(done) == len(rows) else f"{len(done)} of {len(rows)}, rest crashed"
        lines.append(table_row([arm, count, *(cell(done) if done else "" for cell in cells.values())]))
    for arm, rows in by_arm.items():
        if crashed := [row for row in rows if row["status"] == "crashed"]:
            errors = "; ".join(f"seed {row['seed']} after {row['steps']} steps: {row['error']}" for row in crashed)
            lines += ["", f"**{arm}** crashed: {len(crashed)} of {len(rows)}, {errors}"]
    return "\n".join([*lines, "", _definitions(threshold), ""])


def differences_table(results: list[dict], baseline: str) -> str:
    """A line per other arm: its difference from `baseline`, seed by seed. `results` are rows of results.csv."""
    done = [row for row in results if row["status"] == "finished"]
    evaluated = sorted({key for row in done for key in row if re.search(DIFFERENCES, key)})
    columns = ["final_reward", "auc", *evaluated]
    lines = [table_row([f"minus {baseline}", *columns]), table_row(["---"] + ["---:"] * len(columns))]
    theirs = [row for row in done if row["arm"] == baseline]
    for arm in dict.fromkeys(row["arm"] for row in results if row["arm"] != baseline):
        ours = [row for row in done if row["arm"] == arm]
        lines.append(table_row([arm, *(difference(ours, theirs, column) for column in columns)]))
    return "\n".join(
        [*lines, "", "Mean difference of runs with the same seed ± half its 95 % confidence interval.", ""]
    )


def difference(ours: list[dict], theirs: list[dict], column: str) -> str:
    differences = paired_differences(ours, theirs, column)
    if not differences:
        return ""
    mean, half = mean_and_half_width(differences)
    return f"{mean:+.3f}" if half is None else f"{mean:+.3f} ± {half:.3f}"


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(column: str, done: list[dict]) -> str:
    values = [row[column] for row in done if column in row]
    if not values:
        return ""
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _reached(done: list[dict]) -> str:
    """The mean over the runs that got there, and how many they are when not all did."""
    steps = [row["steps_to_threshold"] for row in done if "steps_to_threshold" in row]
    if not steps:
        return f"never, 0 of {len(done)}"
    return f"{fmean(steps):.1f}" if len(steps) == len(done) else f"{fmean(steps):.1f}, by {len(steps)} of {len(done)}"


def _definitions(threshold: float | None) -> str:
    text = (
        "Mean ± half the 95 % confidence interval (Student t over the finished runs, one per seed; one run has none). "
        "Final reward: sampled training reward over the last fifth of the steps (at least 3). Area under the curve: "
        "mean reward over all steps. pass@1, pass@k, held-out score: of the last evaluation. Collapsed: the moving "
        "average of the reward over a fifth of the steps ends below its peak by more than half of its gain from first "
        "to peak, and by more than three times the noise of a step."
    )
    if threshold is not None:
        text += f" Steps to {threshold:g}: first step at which the mean of the last 3 rewards is at least that."
    return text
