"""What all figures share: colours, the page, titles and legends of panels, and the curve of a metric.

Matplotlib takes a second to load, so it is imported where something is drawn and not at the top.
"""

import numpy as np

COLORS = ("#2f6db3", "#e07b39", "#3a9a78", "#8a62b0", "#c9485b", "#8c6d4f", "#d58fb4", "#6b7c8c")
LINE_STYLES = ("-", (0, (4, 1.6)), (0, (1, 1.3)))
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
LEFT, RIGHT = 0.04, 0.985  # page margins, as shares of the width


def new_page(height: float, header: float, bottom: float, n_rows: int, n_columns: int, width=13.5, left=LEFT, **grid):
    """An empty page and the grid for its panels: matplotlib's Figure and GridSpec.

    `header` and `bottom` are kept free above and below the grid; they, `height` and `width` are in inches. `grid` goes
    to matplotlib's add_gridspec.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120)
    top, bottom = 1 - header / height, bottom / height
    return figure, figure.add_gridspec(n_rows, n_columns, left=left, right=RIGHT, bottom=bottom, top=top, **grid)


def write_title(axes, title: str, reading: str) -> None:
    """Above the panel: its title, and below that in grey how to read it."""
    axes.set_title(title, loc="left", pad=20, fontsize=10.5, fontweight="bold")
    axes.annotate(reading, (0, 1), (0, 7), "axes fraction", textcoords="offset points", color=MUTED)
    axes.tick_params(length=0)


def write_legend(axes, handles: list) -> None:
    """At the right end of the panel's title line. A panel with one curve needs none: its title says what it is."""
    if len(handles) > 1:
        height = axes.figure.get_figheight() * axes.get_position().height  # inches
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1 + 15 / (72 * height)), ncols=len(handles))


def leave_room(axes, names: list[str]) -> None:
    """For names at the ticks of the y axis, which would leave the page or cover the panel to the left."""
    box, width = axes.get_position(), 0.0052 * max(map(len, names))
    axes.set_position([box.x0 + width, box.y0, box.width - width, box.height])


def series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps[N] at which a run measured `key`, and its values[N]; `rows` are the lines of its metrics.jsonl."""
    measured = [row for row in rows if key in row]
    return np.array([row["step"] for row in measured], dtype=int), np.array([row[key] for row in measured])


def smoothed(values: np.ndarray, average=np.mean) -> np.ndarray:
    """Moving average of values[N], centred, over about a fifteenth of the run and at least 5 steps.

    Near the ends the window is cut short, so that the curve spans the whole run and does not lag.
    """
    half = max(2, len(values) // 30)
    return np.array([average(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
