"""What a comparison found: results.csv, a row per run; results.md, a row per arm; figures."""

import csv
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev

from openrlhf_apo.analysis.compare_runs import Run

COLUMNS = (
    *("arm", "seed", "status", "error", "steps", "first_reward", "final_reward", "auc", "pass1", "passk", "k"),
    *("steps_to_threshold", "collapsed", "seconds", "seconds_per_step"),
)
THRESHOLD_WINDOW = 3  # steps
# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def t_975(degrees: int) -> float:
    """97.5 % quantile of Student's t; above 30 degrees of freedom by the Cornish-Fisher expansion, to 1e-4."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_and_half_width(values: list[float]) -> tuple[float, float | None]:
    """Mean of values[N] and half its 95 % confidence interval, by Student's t; None of one value."""
    if len(values) < 2:
        return values[0], None
    return fmean(values), t_975(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def steps_to_threshold(rows: list[dict], threshold: float) -> int | None:
    """The first step at which the mean reward of the last three steps is at least `threshold`; None when never."""
    trained = [row for row in rows if "reward_mean" in row]
    for end in range(THRESHOLD_WINDOW, len(trained) + 1):
        if fmean(row["reward_mean"] for row in trained[end - THRESHOLD_WINDOW : end]) >= threshold:
            return trained[end - 1]["step"]
    return None


def has_collapsed(rewards: list[float]) -> bool:
    """Whether a run lost more than half of what it had gained, and more than noise explains.

    With m the moving average of rewards[N] over a fifth of the steps (at least 3), and noise the standard deviation
    of a step's reward, taken from differences of consecutive steps: max m - last m must exceed half of
    max m - first m, and three times the noise.
    """
    window = _window(rewards)
    averages = [fmean(rewards[i : i + window]) for i in range(len(rewards) - window + 1)]
    differences = [b - a for a, b in zip(rewards, rewards[1:], strict=False)]
    noise = stdev(differences) / math.sqrt(2) if len(differences) > 1 else 0.0
    loss = max(averages) - averages[-1]
    return loss > 0.5 * (max(averages) - averages[0]) and loss > 3 * noise


def _window(rewards: list[float]) -> int:
    return min(len(rewards), max(3, len(rewards) // 5))


def measure(rows: list[dict], threshold: float | None) -> dict:
    """The columns that a finished run's rows of metrics.jsonl give; what was not measured is absent."""
    trained = [row for row in rows if "reward_mean" in row]
    rewards = [row["reward_mean"] for row in trained]
    window = _window(rewards)
    seconds = [row["time/step"] for row in rows if "time/step" in row]
    found = {
        "steps": len(rewards),
        "first_reward": fmean(rewards[:window]),
        "final_reward": fmean(rewards[-window:]),
        "auc": fmean(rewards),
        "collapsed": int(has_collapsed(rewards)),
    }
    if seconds:
        found["seconds"] = sum(seconds)
        found["seconds_per_step"] = median(row["time/step"] for row in trained)
    if evaluated := [row for row in rows if "eval/pass1" in row]:
        found["pass1"] = evaluated[-1]["eval/pass1"]
        for key, value in evaluated[-1].items():
            if (match := re.fullmatch(r"eval/pass(\d+)", key)) and key != "eval/pass1":
                found |= {"passk": value, "k": int(match[1])}
    if threshold is not None and (step := steps_to_threshold(rows, threshold)) is not None:
        found["steps_to_threshold"] = step
    return found


def write_results(runs: list[Run], threshold: float | None, output_dir: Path) -> str:
    """Write results.csv, results.md and the figures into `output_dir`; returns the table of results.md."""
    from openrlhf_apo.analysis.compare_figure import build_figures

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
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in results:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    table = markdown_table(results, threshold)
    pictures = ""
    for topic, figure in build_figures(rows_by_run).items():
        figure.savefig(output_dir / f"figure_{topic}.png")
        pictures += f"\n![{topic}](figure_{topic}.png)\n"
    (output_dir / "results.md").write_text(f"# {output_dir.name}\n\n{table}{pictures}", encoding="utf-8")
    return table


def markdown_table(results: list[dict], threshold: float | None) -> str:
    """A line per arm, over its finished runs; below it the crashed runs by name, and what the columns mean.

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
        f"steps to {threshold}": _reached,
        "collapsed": lambda done: f"{sum(row['collapsed'] for row in done)} of {len(done)}",
        "s / step": partial(_interval, "seconds_per_step"),
    }
    if not any("pass1" in row for row in results):
        del cells["pass@1"]
    if not ks:
        del cells[f"pass@{k}"]
    if threshold is None:
        del cells[f"steps to {threshold}"]
    lines = [_table_row(["arm", "runs", *cells]), _table_row(["---"] + ["---:"] * (len(cells) + 1))]
    for arm, rows in by_arm.items():
        done = [row for row in rows if row["status"] == "finished"]
        count = str(len(done)) if len(done) == len(rows) else f"{len(done)} of {len(rows)}, rest crashed"
        lines.append(_table_row([arm, count, *(cell(done) if done else "" for cell in cells.values())]))
    for arm, rows in by_arm.items():
        if crashed := [row for row in rows if row["status"] == "crashed"]:
            errors = "; ".join(f"seed {row['seed']} after {row['steps']} steps: {row['error']}" for row in crashed)
            lines += ["", f"**{arm}** crashed: {len(crashed)} of {len(rows)}, {errors}"]
    return "\n".join([*lines, "", _definitions(threshold), ""])


def _table_row(cells: list[str]) -> str:
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
        "mean reward over all steps. pass@1 and pass@k: held-out, last evaluation. Collapsed: the moving average of "
        "the reward over a fifth of the steps ends below its peak by more than half of its gain from first to peak, "
        "and by more than three times the noise of a step."
    )
    if threshold is not None:
        text += f" Steps to {threshold:g}: first step at which the mean of the last 3 rewards is at least that."
    return text
