"""The panels of the report: which metrics each shows, how it is to be read, and how it is drawn.

A new panel is a new entry of PANELS, at the end of this file.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from openrlhf_apo.analysis.figures import COLORS, LINE_STYLES, MUTED, leave_room, series, smoothed
from openrlhf_apo.analysis.verdict import ROUNDING
from openrlhf_apo.trainer.health import Health
from openrlhf_apo.trainer.metrics import held_out

PHASES = ("generate", "reward", "update", "sync", "eval", "save", "other")
MISMATCH_FLOOR = 1e-8  # nats, where the axis begins


@dataclass(frozen=True)
class Run:
    """One run on the page: the `rows` of its metrics.jsonl. `pens[i]` draws the i-th curve of a panel."""

    name: str
    rows: list[dict]
    pens: list[dict]  # colour and line style


@dataclass(frozen=True)
class Panel:
    """One set of axes. `curves` maps metric keys to labels.

    `draw(axes, runs, curves)` draws them and returns what the legend shows, matplotlib's handles. `limits` are those
    of the y axis; None is as the data say.
    """

    title: str
    reading: str
    curves: dict[str, str]
    draw: Callable
    limits: tuple = (None, None)


def _draw_curves(axes, runs: list[Run], curves: dict[str, str], average=np.mean) -> list:
    """Every curve of every run: faint as measured, bold smoothed."""
    from matplotlib.lines import Line2D

    drawn = {}
    for run in runs:
        for (key, label), pen in zip(curves.items(), run.pens, strict=False):
            steps, values = series(run.rows, key)
            if len(steps):
                axes.plot(steps, values, color=pen["color"], lw=0.9, alpha=0.28)
                axes.plot(steps, smoothed(values, average), lw=1.7, **pen)
                drawn[label] = pen if len(runs) == 1 else pen | {"color": MUTED}
    return [Line2D([], [], lw=1.7, label=label, **pen) for label, pen in drawn.items()]


def _draw_reward(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The sampled reward as a curve, the held-out one as a diamond per evaluation."""
    from matplotlib.lines import Line2D

    handles = _draw_curves(axes, runs, {"reward_mean": curves["reward_mean"]})
    markers = {"marker": "D", "ms": 5.5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    labels = {}
    for run in runs:
        key, evaluated = held_out(run.rows)
        steps, values = [step for step, _ in evaluated], [value for _, value in evaluated]
        axes.plot(steps, values, color=_mark_color(run, runs), lw=1, linestyle=LINE_STYLES[2], zorder=3, **markers)
        labels |= {curves[key]: None} if evaluated else {}
    color = COLORS[1] if len(runs) == 1 else MUTED
    handles += [Line2D([], [], color=color, lw=0, label=label, **markers) for label in labels]
    return handles


def _draw_inner(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The curves. Of a single run also a hairline per rollout, through the values of its optimizer steps."""
    for key, pen in zip(curves, runs[0].pens, strict=False) if len(runs) == 1 else ():
        strokes = [(row["step"], row[f"inner/{key}"]) for row in runs[0].rows if f"inner/{key}" in row]
        x = [x for step, values in strokes for x in [*(step + i / len(values) for i in range(len(values))), np.nan]]
        y = [y for _, values in strokes for y in [*values, np.nan]]
        axes.plot(x, y, color=pen["color"], lw=0.5, alpha=0.4)
    return _draw_curves(axes, runs, curves)


def _draw_ess(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The curve, and a triangle for each step whose α stopped at a bound: at the upper edge for alpha_max, or lower.

    With an α per group, the step counts as what most of its groups did.
    """
    from matplotlib.lines import Line2D

    handles = _draw_curves(axes, runs, curves)
    for outcome, marker, edge, away, label in (
        ("clamped_hi", "^", 0.97, -0.045, r"at $\alpha_{max}$"),
        ("clamped_lo", "v", 0.03, 0.045, r"at $\alpha_{min}$"),
    ):
        clamped = [[row["step"] for row in run.rows if _main_outcome(row) == outcome] for run in runs]
        for index, (run, steps) in enumerate(zip(runs, clamped, strict=True)):
            y = [edge + index * away] * len(steps)
            color = _mark_color(run, runs)
            axes.plot(steps, y, marker, color=color, ms=3, mew=0, transform=axes.get_xaxis_transform())
        if any(clamped):
            color = COLORS[1] if len(runs) == 1 else MUTED
            handles.append(Line2D([], [], color=color, marker=marker, ms=4, mew=0, lw=0, label=label))
    return handles


def _mark_color(run: Run, runs: list[Run]) -> str:
    """Of marks beside a panel's first curve: a run alone on the page has a second colour for them."""
    return run.pens[1 if len(runs) == 1 else 0]["color"]


def _main_outcome(row: dict) -> str | None:
    """What the ess controller did in this step; with an α per group, what it did to most groups."""
    outcome = row.get("ess_outcome")
    return max(outcome, key=outcome.get) if isinstance(outcome, dict) else outcome


def _draw_spiky(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """The curves, smoothed by a median; on a log axis when spikes would flatten everything else."""
    values = np.concatenate([series(run.rows, key)[1] for run in runs for key in curves])
    if values.max() > 8 * np.median(values):
        axes.set_yscale("log", nonpositive="mask")
    return _draw_curves(axes, runs, curves, average=np.median)


def _draw_mismatch(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """On a log axis of fixed size, from below rounding to the limit at which a run stops: differences of rounding
    stay at its bottom. Values below the axis, such as 0, are drawn at its edge."""
    floored = [
        replace(
            run, rows=[row | {key: max(row[key], MISMATCH_FLOOR) for key in curves if key in row} for row in run.rows]
        )
        for run in runs
    ]
    axes.set_yscale("log")
    axes.axhspan(MISMATCH_FLOOR, ROUNDING, color=MUTED, alpha=0.1, lw=0)
    axes.axhline(Health.max_mismatch, color=MUTED, lw=0.9, linestyle=LINE_STYLES[1])
    handles = _draw_curves(axes, floored, curves, average=np.median)
    axes.set_yticks([1e-8, 1e-6, 1e-4, 1e-2, 1])
    axes.set_ylim(bottom=MISMATCH_FLOOR)
    return handles


def _draw_time(axes, runs: list[Run], curves: dict[str, str]) -> list:
    """A bar per phase and run: seconds per step, averaged over the run."""
    splits = [seconds_per_step(run.rows) for run in runs]
    phases = [phase for phase in PHASES if any(split[phase] for split in splits)]
    height = 0.72 / len(runs)
    for index, (run, split) in enumerate(zip(runs, splits, strict=True)):
        y = np.arange(len(phases)) + (index - (len(runs) - 1) / 2) * height
        bars = axes.barh(y, [split[phase] for phase in phases], height, color=run.pens[0]["color"], alpha=0.9)
        if len(runs) == 1:
            labels = [f"{split[phase]:.2g} s, {split[phase] / sum(split.values()):.0%}" for phase in phases]
            axes.bar_label(bars, labels, padding=4, color=MUTED)
    axes.set_xlim(0, 1.25 * max(max(split.values()) for split in splits))
    leave_room(axes, phases)
    axes.set_yticks(range(len(phases)), phases)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return []


def seconds_per_step(rows: list[dict]) -> dict[str, float]:
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
        "mean of the sampled answers; marks: of the held-out ones",
        {"reward_mean": "sampled", "eval/pass1": "pass@1", "eval/score_mean": "score"},
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
        _draw_curves,
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
        "nats; of the sampling policy, by its samples or exact",
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
        "trainer against engine [nats]; shaded: rounding; dashed: limit",
        {"rollout_mismatch": "mismatch"},
        _draw_mismatch,
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
