"""The picture of a run: what its metrics.jsonl says, as small panels on one page.

One run: a colour per curve. Several runs: a colour per run, a line style per curve. A panel whose keys no run has is
left out, so a GRPO run gives fewer panels than an APO run. Matplotlib is imported only to draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import numpy as np

COLORS = ("#2f6db3", "#e07b39", "#3a9a78", "#8a62b0", "#c9485b", "#8c6d4f", "#d58fb4", "#6b7c8c")
LINE_STYLES = ("-", (0, (4, 1.6)), (0, (1, 1.3)))
PHASES = ("generate", "reward", "log_probs", "update", "sync", "eval", "save", "other")
INK, MUTED = "#22272e", "#6e7781"
STYLE = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": "#b8bfc7",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e9ed",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0,
    "mathtext.default": "regular",
}
COLUMNS, LEGEND_COLUMNS = 3, 4
LEFT, RIGHT = 0.04, 0.985  # page margins, as shares of the width


@dataclass(frozen=True)
class Run:
    """One run on the page. `pens[i]` is the colour and line style of a panel's i-th curve."""

    name: str
    rows: list[dict]
    pens: list[dict]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps[N] at which `key` was measured, and its values[N]."""
        rows = [row for row in self.rows if key in row]
        return np.array([row["step"] for row in rows], dtype=int), np.array([row[key] for row in rows])


@dataclass(frozen=True)
class Panel:
    """One set of axes. `curves` maps metric keys to labels; `draw(axes, runs, curves)` returns legend handles."""

    title: str
    reading: str
    curves: dict[str, str]
    draw: Callable
    limits: tuple = (None, None)


def build_figure(rows_by_run: dict[str, list[dict]]):
    """Draw runs, given as {run name: the rows of its metrics.jsonl}.

    Returns the matplotlib Figure and the titles of its panels, in order. Raises ValueError when there is nothing to
    draw.
    """
    from matplotlib import rc_context

    keys = {key for rows in rows_by_run.values() for row in rows for key in row}
    panels = [panel for panel in PANELS if keys & panel.curves.keys()]
    if not panels:
        raise ValueError("no metric to draw: metrics.jsonl holds none of the keys that the report shows")
    if len(rows_by_run) == 1:
        pens = [[{"color": color, "linestyle": "-"} for color in COLORS]]
    else:
        pens = ([{"color": color, "linestyle": style} for style in LINE_STYLES] for color in cycle(COLORS))
    runs = [Run(name, rows, pen) for (name, rows), pen in zip(rows_by_run.items(), pens, strict=False)]
    with rc_context(STYLE):
        return _lay_out(panels, runs), [panel.title for panel in panels]


def smoothed(values: np.ndarray, average=np.mean) -> np.ndarray:
    """Centred moving average of values[N] over about a fifteenth of the run; cut at the ends, so that nothing lags."""
    half = max(1, len(values) // 30)
    return np.array([average(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _lay_out(panels: list[Panel], runs: list[Run]):
    """A header, then a grid with `COLUMNS` panels a row; the last panel takes what is left of its row."""
    from matplotlib.figure import Figure

    n_rows, legend_rows = -(-len(panels) // COLUMNS), len(runs) > 1 and -(-len(runs) // LEGEND_COLUMNS)
    header = 1.4 + 0.25 * legend_rows  # inches, as `height`
    height = header + 2.6 * n_rows
    figure = Figure(figsize=(13.5, height), dpi=120)
    grid = figure.add_gridspec(
        n_rows,
        COLUMNS,
        left=LEFT,
        right=RIGHT,
        bottom=0.4 / height,
        top=1 - header / height,
        hspace=0.48,
        wspace=0.19,
    )
    n_steps = max(1, *(run.rows[-1]["step"] for run in runs))
    _write_header(figure, runs, n_steps)
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        axes = figure.add_subplot(grid[row, column:] if panel is panels[-1] else grid[row, column])
        axes.set_title(panel.title, loc="left", pad=20, fontsize=10.5, fontweight="bold")
        axes.annotate(panel.reading, (0, 1), (0, 7), "axes fraction", textcoords="offset points", color=MUTED)
        axes.tick_params(length=0)
        axes.yaxis.set_major_formatter("{x:g}")  # without an exponent apart from the ticks, over the text
        axes.set_xlim(-0.015 * n_steps, 1.015 * n_steps)
        handles = panel.draw(axes, runs, panel.curves)
        axes.set_ylim(*panel.limits)
        if len(handles) > 1:
            title_line = 1 + 15 / (72 * height * axes.get_position().height)
            axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, title_line), ncols=len(handles))
    return figure


def _write_header(figure, runs: list[Run], n_steps: int):
    from matplotlib.lines import Line2D

    height = figure.get_figheight()
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    bold = "moving average (median of mismatch and gradient norm)"
    note = f"{n_steps} rollout steps along x. Faint: each step. Bold: {bold}."
    figure.text(LEFT, 1 - 0.42 / height, name, fontsize=15, fontweight="bold")
    figure.text(LEFT, 1 - 0.66 / height, note, fontsize=9, color=MUTED)
    if len(runs) > 1:
        figure.legend(
            handles=[Line2D([], [], color=run.pens[0]["color"], lw=2.8, label=run.name) for run in runs],
            loc="upper left",
            bbox_to_anchor=(LEFT, 1 - 0.78 / height),
            borderpad=0,
            ncols=LEGEND_COLUMNS,
            fontsize=10,
        )


def _draw_curves(axes, runs: list[Run], curves: dict[str, str], average=np.mean) -> list:
    """Every curve of every run: faint as measured, bold smoothed."""
    from matplotlib.lines import Line2D

    drawn = {}
    for run in runs:
        for (key, label), pen in zip(curves.items(), run.pens, strict=False):
            steps, values = run.series(key)
            if len(steps):
                axes.plot(steps, values, color=pen["color"], lw=0.9, alpha=0.28)
                axes.plot(steps, smoothed(values, average), lw=1.7, **pen)
                drawn[label] = pen if len(runs) == 1 else pen | {"color": MUTED}
    return [Line2D([], [], lw=1.7, label=label, **pen) for label, pen in drawn.items()]


def _draw_reward(axes, runs: list[Run], curves: dict[str, str]) -> list:
    from matplotlib.lines import Line2D

    handles = _draw_curves(axes, runs, {"reward_mean": curves["reward_mean"]})
    markers = {"marker": "D", "ms": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    for run in runs:
        steps, values = run.series("eval/pass1")
        color = run.pens[len(runs) == 1]["color"]
        axes.plot(steps, values, color=color, lw=1, linestyle=LINE_STYLES[2], zorder=3, **markers)
    if any("eval/pass1" in row for run in runs for row in run.rows):
        color = COLORS[1] if len(runs) == 1 else MUTED
        handles.append(Line2D([], [], color=color, lw=0, label=curves["eval/pass1"], **markers))
    return handles


def _draw_inner(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The curves; a single run's also as hairline strokes, one per rollout, through its optimizer steps."""
    for key, pen in zip(curves, runs[0].pens, strict=False) if len(runs) == 1 else ():
        strokes = [(row["step"], row[f"inner/{key}"]) for row in runs[0].rows if f"inner/{key}" in row]
        x = [x for step, values in strokes for x in [*(step + i / len(values) for i in range(len(values))), np.nan]]
        y = [y for _, values in strokes for y in [*values, np.nan]]
        axes.plot(x, y, color=pen["color"], lw=0.5, alpha=0.4)
    return _draw_curves(axes, runs, curves)


def _draw_ess(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The curve, with a triangle at the upper or lower edge for each step whose α, or most of its α, was clamped."""
    from matplotlib.lines import Line2D

    handles = _draw_curves(axes, runs, curves)
    for outcome, marker, edge, away, label in (
        ("clamped_hi", "^", 0.97, -0.045, r"at $\alpha_{max}$"),
        ("clamped_lo", "v", 0.03, 0.045, r"at $\alpha_{min}$"),
    ):
        clamped = [[row["step"] for row in run.rows if _main_outcome(row) == outcome] for run in runs]
        for index, (run, steps) in enumerate(zip(runs, clamped, strict=True)):
            y = [edge + index * away] * len(steps)
            pen = run.pens[len(runs) == 1]
            axes.plot(steps, y, marker, color=pen["color"], ms=3, mew=0, transform=axes.get_xaxis_transform())
        if any(clamped):
            color = COLORS[1] if len(runs) == 1 else MUTED
            handles.append(Line2D([], [], color=color, marker=marker, ms=4, mew=0, lw=0, label=label))
    return handles


def _main_outcome(row: dict) -> str | None:
    """The outcome of the ess controller; with an α per group, that of most groups."""
    outcome = row.get("ess_outcome")
    return max(outcome, key=outcome.get) if isinstance(outcome, dict) else outcome


def _draw_spiky(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The curves with a median for the average, on a log axis when spikes would flatten everything else."""
    values = np.concatenate([run.series(key)[1] for run in runs for key in curves])
    if values.max() > 8 * np.median(values):
        axes.set_yscale("log", nonpositive="mask")
    return _draw_curves(axes, runs, curves, average=np.median)


def _draw_time(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """A bar per phase and run: seconds per step, averaged over the run."""
    splits = [_seconds_per_step(run.rows) for run in runs]
    phases = [phase for phase in PHASES if any(split[phase] for split in splits)]
    height = 0.72 / len(runs)
    for index, (run, split) in enumerate(zip(runs, splits, strict=True)):
        y = np.arange(len(phases)) + (index - (len(runs) - 1) / 2) * height
        bars = axes.barh(y, [split[phase] for phase in phases], height, color=run.pens[0]["color"], alpha=0.9)
        if len(runs) == 1:
            labels = [f"{split[phase]:.2g} s, {split[phase] / sum(split.values()):.0%}" for phase in phases]
            axes.bar_label(bars, labels, padding=4, color=MUTED)
    axes.set_xlim(0, 1.25 * max(max(split.values()) for split in splits))
    axes.set_yticks(range(len(phases)), phases)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return []


def _seconds_per_step(rows: list[dict]) -> dict[str, float]:
    """Mean seconds per rollout step in each phase; what no phase accounts for is "other"."""
    n_steps = max(1, sum(row["step"] > 0 for row in rows))
    split = dict.fromkeys(PHASES, 0.0)
    for row in rows:
        known = {phase: row[f"time/{phase}"] for phase in PHASES if f"time/{phase}" in row}
        rest = max(0.0, row.get("time/step", 0.0) - sum(known.values()))
        for phase, seconds in (*known.items(), ("other", rest)):
            split[phase] += seconds / n_steps
    return split


PANELS = (
    Panel(
        "Reward",
        "mean of the sampled answers; pass@1: held-out",
        {"reward_mean": "sampled", "eval/pass1": "pass@1"},
        _draw_reward,
    ),
    Panel(
        "Divergence order α",
        "near 1: keep every good answer; near 0: settle on one",
        {"alpha": "α"},
        _draw_inner,
        (0, 1.04),
    ),
    Panel(
        "What moves α",
        "α falls when the policy is confident and rewards improve",
        {"confidence": "confidence $c_t$", "improvement": "improvement $p_t$"},
        _draw_inner,
    ),
    Panel(
        "Effective sample size / P",
        "1: a group's answers weigh the same; 1/P: one answer decides",
        {"ess": "ESS / P"},
        _draw_ess,
        (0, 1.04),
    ),
    Panel(
        "Entropy over a group",
        "1: all its answers equally likely; lower: nearer to one answer",
        {"entropy_p": "policy p", "entropy_q": "target q"},
        _draw_curves,
    ),
    Panel(
        "Divergence to the target",
        r"$D_\alpha(q\,\Vert\,p)$, the loss; 0: the policy is the target",
        {"divergence": r"$D_\alpha$"},
        _draw_curves,
    ),
    Panel(
        "Spread of the log-ratios",
        "std [nats]; how far the policy has moved from its anchor",
        {"log_ratio_std": "log-ratio std"},
        _draw_curves,
    ),
    Panel(
        "Entropy of a token",
        "nats; of the sampling policy by its samples, and exact where measured",
        {"token_entropy": "by samples", "entropy": "exact"},
        _draw_curves,
    ),
    Panel(
        "Clipped tokens",
        "share whose gradient a clip changed",
        {"clipped_fraction": "clipped"},
        _draw_curves,
    ),
    Panel(
        "KL to the reference",
        "nats per token",
        {"kl": "KL"},
        _draw_curves,
    ),
    Panel(
        "Rollout mismatch",
        "trainer's against engine's log-probs; flat and near 0 is healthy",
        {"rollout_mismatch": "mismatch"},
        _draw_spiky,
    ),
    Panel(
        "Gradient norm",
        "before clipping; lone spikes are harmless, steady growth is not",
        {"grad_norm": "gradient norm"},
        _draw_spiky,
    ),
    Panel(
        "Response length",
        "mean tokens of a sampled answer",
        {"response_length": "tokens"},
        _draw_curves,
    ),
    Panel(
        "Samples that teach little",
        "share of groups with equal rewards; share of answers cut off",
        {"zero_variance_fraction": "equal", "truncated_fraction": "cut off"},
        _draw_curves,
    ),
    Panel(
        "Where the time goes",
        "mean seconds of a rollout step in each phase",
        {f"time/{phase}": phase for phase in PHASES},
        _draw_time,
    ),
)
