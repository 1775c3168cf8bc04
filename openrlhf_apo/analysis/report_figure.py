"""The picture of a run: its metrics.jsonl as small panels on one page.

One run: a colour per curve. Several runs: a colour per run, a line style per curve. A panel whose metrics no run has
is left out, so a GRPO run has fewer panels than an APO run.
"""

from itertools import cycle
from math import ceil

from openrlhf_apo.analysis.figures import COLORS, LEFT, LINE_STYLES, MUTED, STYLE, new_page, write_legend, write_title
from openrlhf_apo.analysis.report_panels import PANELS, Panel, Run

COLUMNS, LEGEND_COLUMNS = 3, 4


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


def _lay_out(panels: list[Panel], runs: list[Run]):
    """A header, then a grid with `COLUMNS` panels a row; the last panel takes what is left of its row."""
    n_rows = ceil(len(panels) / COLUMNS)
    legend_rows = ceil(len(runs) / LEGEND_COLUMNS) if len(runs) > 1 else 0
    header = 1.4 + 0.25 * legend_rows  # inches
    figure, grid = new_page(header + 2.6 * n_rows, header, 0.4, n_rows, COLUMNS, hspace=0.48, wspace=0.19)
    n_steps = max(1, *(run.rows[-1]["step"] for run in runs))
    _write_header(figure, runs, n_steps)
    for index, panel in enumerate(panels):
        row, column = divmod(index, COLUMNS)
        axes = figure.add_subplot(grid[row, column:] if panel is panels[-1] else grid[row, column])
        write_title(axes, panel.title, panel.reading)
        axes.yaxis.set_major_formatter("{x:g}")  # without an exponent apart from the ticks, over the text
        axes.set_xlim(-0.015 * n_steps, 1.015 * n_steps)
        handles = panel.draw(axes, runs, panel.curves)
        axes.set_ylim(*panel.limits)
        write_legend(axes, handles)
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
