"""A run in numbers (what it gained, whether it collapsed), and the interval of a number over seeds."""

import math
import re
from statistics import fmean, median, stdev

from openrlhf_apo.trainer.metrics import held_out

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


def paired_differences(rows: list[dict], baseline: list[dict], column: str) -> list[float]:
    """rows - baseline in a column of results.csv, for each seed that finished in both."""
    theirs = {row["seed"]: row[column] for row in baseline if column in row}
    return [row[column] - theirs[row["seed"]] for row in rows if column in row and row["seed"] in theirs]


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
    """The columns of results.csv for a finished run, from the lines of its metrics.jsonl.

    What the run did not measure is absent, as is the step of a threshold that it never reached.
    """
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
    for column, of in (("final_entropy", "token_entropy"), ("final_alpha", "alpha")):
        if values := [row[of] for row in trained[-window:] if of in row]:
            found[column] = fmean(values)
    if guard := [row["confidence"] * row["improvement"] for row in trained if "improvement" in row]:
        found["guard"] = fmean(guard)
    key, evaluated = held_out(rows)
    if evaluated:
        step, mean = evaluated[-1]
        found[key.removeprefix("eval/")] = mean
        last = next(row for row in rows if row["step"] == step)
        for name, value in last.items():
            if key == "eval/pass1" != name and (match := re.fullmatch(r"eval/pass(\d+)", name)):
                found |= {"passk": value, "k": int(match[1])}
        found |= {name: value for name, value in last.items() if name.startswith("eval/")}
    if threshold is not None and (step := steps_to_threshold(rows, threshold)) is not None:
        found["steps_to_threshold"] = step
    return found
