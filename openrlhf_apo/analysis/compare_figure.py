"""The pictures of a comparison: a curve per arm, the mean over its seeds, in its 95 % confidence band. Of fewer than
four seeds the band would fill the panel: then each seed is a thin line.

One file per topic: reward, what moves alpha, entropies and log-ratios. A panel whose key no run has is left out, and
a file without panels too.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from math import ceil

import numpy as np

from openrlhf_apo.analysis.compare_runs import Run
from openrlhf_apo.analysis.compare_statistics import mean_and_half_width
from openrlhf_apo.analysis.figures import (
    COLORS,
    LEFT,
    LINE_STYLES,
    MUTED,
    STYLE,
    leave_room,
    new_page,
    series,
    smoothed,
    write_title,
)

LEGEND_COLUMNS = 6
BAND_SEEDS = 4


@dataclass(frozen=True)
class Arm:
    """One arm on the page: the lines of each run's metrics.jsonl, for runs that finished and runs that crashed."""

    name: str
    pen: dict  # colour and line style: of arms that do the same, both still show
    finished: list[list[dict]]
    crashed: list[list[dict]]

    @property
    def rows(self) -> list[dict]:
        return [row for rows in self.finished + self.crashed for row in rows]

    @property
    def label(self) -> str:
        return f"{self.name} ({len(self.crashed)} crashed)" if self.crashed else self.name


@dataclass(frozen=True)
class Panel:
    """One set of axes for the metric `key`; a wide one has a row of the page to itself."""

    title: str
    reading: str
    key: str
    draw: Callable
    wide: bool = False


def build_figures(rows_by_run: dict[Run, list[dict]]) -> dict:
    """{topic: matplotlib Figure} of runs, given as {run: the lines of its metrics.jsonl}."""
    from matplotlib import rc_context

    arms = []
    names = dict.fromkeys(run.arm for run in rows_by_run)
    for name, color, style in zip(names, cycle(COLORS), cycle(LINE_STYLES), strict=False):
        runs = [(run, list(map(_with_derived, rows))) for run, rows in rows_by_run.items() if run.arm == name]
        finished = [rows for run, rows in runs if run.finished]
        crashed = [rows for run, rows in runs if not run.finished]
        arms.append(Arm(name, {"color": color, "linestyle": style}, finished, crashed))
    keys = {key for arm in arms for row in arm.rows for key in row}
    figures = {}
    for topic, all_panels in TOPICS.items():
        if panels := [panel for panel in all_panels if panel.key in keys]:
            with rc_context(STYLE):
                figures[topic] = _page(panels, arms)
    return figures


def _with_derived(row: dict) -> dict:
    """The row, and in it `clamped`, the share of its α that was at a bound, and pass@k as `eval/passk`, whatever k."""
    derived = {}
    for key in row.keys() - {"eval/pass1"}:
        if re.fullmatch(r"eval/pass\d+", key):
            derived["eval/passk"] = row[key]
    if outcome := row.get("ess_outcome"):
        counts = outcome if isinstance(outcome, dict) else {outcome: 1}
        clamped = counts.get("clamped_hi", 0) + counts.get("clamped_lo", 0)
        derived["clamped"] = clamped / sum(counts.values())
    return row | derived


def _page(panels: list[Panel], arms: list[Arm]):
    """A header with the arms' colours, then a grid of panels in reading order."""
    from matplotlib.lines import Line2D

    arms = [arm for arm in arms if any(panel.key in row for panel in panels for row in arm.rows)]
    n_narrow = sum(not panel.wide for panel in panels)
    columns = max(1, 2 if n_narrow in (2, 4) else min(3, n_narrow))
    n_wide = len(panels) - n_narrow
    n_rows = n_wide + ceil(n_narrow / columns)
    header = 0.95 + 0.25 * ceil(len(arms) / LEGEND_COLUMNS)  # inches, as `height`
    height = header + 3.3 * n_rows + 1.2 * n_wide
    ratios = [1.5] * n_wide + [1] * (n_rows - n_wide)
    figure, grid = new_page(height, header, 0.35, n_rows, columns, height_ratios=ratios, hspace=0.36, wspace=0.17)
    note = "Rollout steps along x. Bold: smoothed mean over seeds. "
    note += f"Thin: each seed or, from {BAND_SEEDS} seeds, the mean's 95 % confidence band."
    if any(arm.crashed for arm in arms):
        note += " With a cross: a run that crashed, not in the mean."
    figure.text(LEFT, 1 - 0.27 / height, note, fontsize=9, color=MUTED)
    figure.legend(
        handles=[Line2D([], [], lw=2.4, label=arm.label, **arm.pen) for arm in arms],
        loc="upper left",
        bbox_to_anchor=(LEFT, 1 - 0.38 / height),
        borderpad=0,
        ncols=LEGEND_COLUMNS,
        fontsize=10,
        handlelength=2.6,
    )
    for index, panel in enumerate(panels):  # wide ones first; the last takes what is left of its row
        row, column = (index, 0) if panel.wide else divmod(index - n_wide, columns)
        row += 0 if panel.wide else n_wide
        whole = panel.wide or panel is panels[-1]
        axes = figure.add_subplot(grid[row, column:] if whole else grid[row, column])
        write_title(axes, panel.title, panel.reading)
        panel.draw(axes, arms, panel.key)
    return figure


def _draw_curves(axes, arms: list[Arm], key: str) -> None:
    """The mean of each arm's smoothed runs, and around it the runs or, of BAND_SEEDS or more, its band.

    The runs set the limits: a band may leave the panel, and would flatten everything else.
    """
    seen = []
    for arm in arms:
        by_step: dict[int, list[float]] = {}
        with_band = len(arm.finished) >= BAND_SEEDS
        for rows in arm.finished:
            steps, values = series(rows, key)
            values = smoothed(values)
            for step, value in zip(steps, values, strict=True):
                by_step.setdefault(step, []).append(value)
            if not with_band:
                axes.plot(steps, values, color=arm.pen["color"], lw=0.7, alpha=0.5)
        for rows in arm.crashed:
            steps, values = series(rows, key)
            if len(steps):
                axes.plot(steps, values, color=arm.pen["color"], lw=0.9, markevery=[-1], marker="x", ms=7, mew=2)
                seen += [values.min(), values.max()]
        if by_step:
            steps = sorted(by_step)
            intervals = [mean_and_half_width(by_step[step]) for step in steps]
            means, halves = np.array(intervals, dtype=float).T  # a half-width of None becomes nan
            axes.plot(steps, means, lw=1.8, **arm.pen)
            if with_band:
                low, high = means - halves, means + halves
                axes.fill_between(steps, low, high, color=arm.pen["color"], alpha=0.06, lw=0)
                axes.plot(steps, np.stack([low, high], axis=1), color=arm.pen["color"], alpha=0.4, lw=0.7)
            seen += [value for values in by_step.values() for value in values]
    margin = 0.2 * (max(seen) - min(seen)) or 0.05
    axes.set_ylim(min(seen) - margin, max(seen) + margin)


def _draw_last(axes, arms: list[Arm], key: str) -> None:
    """A line per arm: the last evaluation of each seed as a dot, their mean and interval; hollow: before training."""
    for y, arm in enumerate(arms):
        measured = [[row for row in rows if key in row] for rows in arm.finished]
        measured = [rows for rows in measured if rows]
        if not measured:
            continue
        last = [rows[-1][key] for rows in measured]
        first = [rows[0][key] for rows in measured if rows[0]["step"] == 0]
        mean, half = mean_and_half_width(last)
        if first:
            axes.plot(np.mean(first), y, "o", ms=7, mfc="white", mec=arm.pen["color"], mew=1.3)
        axes.plot(last, [y + 0.22] * len(last), "o", ms=3.5, mew=0, color=arm.pen["color"], alpha=0.6)
        axes.errorbar(mean, y, xerr=half, fmt="o", ms=7, color=arm.pen["color"], capsize=3, lw=1.6)
    leave_room(axes, [arm.name for arm in arms])
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


TOPICS = {
    "reward": (
        Panel("Reward", "mean of the sampled training answers", "reward_mean", _draw_curves, wide=True),
        Panel("Held-out pass@1", "filled: last evaluation; hollow: before training", "eval/pass1", _draw_last),
        Panel("Held-out score", "filled: last evaluation; hollow: before training", "eval/score_mean", _draw_last),
        Panel("Held-out pass@k", "best of k answers; filled: last; hollow: before", "eval/passk", _draw_last),
    ),
    "alpha": (
        Panel("Divergence order α", "near 1: keep every good answer; near 0: settle on one", "alpha", _draw_curves),
        Panel("Confidence $c_t$", "of the policy over a group; moves the guard", "confidence", _draw_curves),
        Panel("Improvement $p_t$", "reward above its baseline; moves the guard", "improvement", _draw_curves),
        Panel("Effective sample size / P", "1: a group's answers weigh the same", "ess", _draw_curves),
        Panel("Share of α at a bound", "ess: no root of ESS(α) = γP within the bounds", "clamped", _draw_curves),
    ),
    "entropy": (
        Panel("Token entropy", "of the sampling policy, −mean log π [nats]", "token_entropy", _draw_curves),
        Panel("Entropy of the policy p", "over a group; 1: all answers equally likely", "entropy_p", _draw_curves),
        Panel("Entropy of the target q", "over a group; p should move towards it", "entropy_q", _draw_curves),
        Panel(
            "Spread of the log-ratios",
            "std [nats]; how far the policy has left its anchor",
            "log_ratio_std",
            _draw_curves,
        ),
    ),
}
