"""The picture of `report --diag`: four panels that show what α does to the gradient."""

from openrlhf_apo.analysis.diagnosis import ALPHAS, SPREAD, Diagnosis
from openrlhf_apo.analysis.figures import COLORS, LINE_STYLES, MUTED, STYLE, new_page, write_legend, write_title

ESTIMATORS = (("", r"Eq. 11: $r^\alpha$"), ("centred_", r"centred: $r^\alpha-E_p[r^\alpha]$"))
ANCHOR, SYNTHETIC = LINE_STYLES[:2]
WIDTH, HEIGHT, HEADER = 12, 8.4, 1.75  # inches
LEFT = 0.055  # margin, as a share of the width


def build_diagnosis_figure(diagnosis: Diagnosis, name: str):
    """Draw a diagnosis of the rollouts called `name`; returns the matplotlib Figure."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure, grid = new_page(HEIGHT, HEADER, 0.6, 2, 2, width=WIDTH, left=LEFT, hspace=0.42, wspace=0.13)
        _write_header(figure, diagnosis, name)
        axes = grid.subplots().flat
        reading = r"Var[$g_\alpha$] of one answer drawn from p (Prop. 4.3); training sums the whole group"
        write_title(axes[0], "Variance of the gradient", reading)
        write_title(axes[1], "Noise to signal", r"Var[$g_\alpha$] / |E $g_\alpha$|²; centred, at the anchor: P − 2")
        for panel, quantity in ((axes[0], "variance"), (axes[1], "noise_to_signal")):
            for (prefix, label), color in zip(ESTIMATORS, COLORS, strict=False):
                _draw_curves(panel, diagnosis, prefix + quantity, color, label)
            panel.set_yscale("log", nonpositive="mask")
        reading = r"tr H / tr F in u (§4.4); 1: as at p = q; anchor: $1-\alpha(1-\alpha)D_\alpha$"
        write_title(axes[2], r"Effective curvature $C_\alpha$", reading)
        _draw_curves(axes[2], diagnosis, "curvature", COLORS[0], r"$C_\alpha$")
        axes[2].set_ylim(min(0, axes[2].get_ylim()[0]), 1.05)
        write_title(axes[3], "Coefficients by difficulty", r"$\Sigma_i|c_i|$ over z-score REINFORCE's, at the anchor")
        _draw_magnitudes(axes[3], diagnosis)
        for panel in axes:
            panel.tick_params(length=0, which="both")
            panel.yaxis.set_major_formatter("{x:g}")
            write_legend(panel, panel.get_legend_handles_labels()[0])
        return figure


def _write_header(figure, diagnosis: Diagnosis, name: str) -> None:
    from matplotlib.lines import Line2D

    figure.text(LEFT, 1 - 0.42 / HEIGHT, f"What α does to {name}", fontsize=15, fontweight="bold")
    figure.text(LEFT, 1 - 0.66 / HEIGHT, str(diagnosis), fontsize=9, color=MUTED)
    band = "Line: median over groups. Band: quartiles. Each group's value is exact: a sum over its answers."
    figure.text(LEFT, 1 - 0.86 / HEIGHT, band, fontsize=9, color=MUTED)
    synthetic = f"synthetic: log-ratios drawn from N(0, {SPREAD:g}²) nats, independent of the rewards"
    figure.legend(
        handles=[
            Line2D([], [], color=MUTED, lw=1.7, linestyle=ANCHOR, label="at the anchor, as saved: u = 0, p uniform"),
            Line2D([], [], color=MUTED, lw=1.7, linestyle=SYNTHETIC, label=synthetic),
        ],
        loc="upper left",
        bbox_to_anchor=(LEFT, 1 - 1.0 / HEIGHT),
        borderpad=0,
        ncols=2,
        fontsize=9,
    )


def _draw_curves(axes, diagnosis: Diagnosis, quantity: str, color: str, label: str) -> None:
    """`quantity` against α: at the anchor with its quartiles, off it dashed."""
    low, median, high = diagnosis.curves[quantity, 0.0].T.numpy()
    axes.fill_between(ALPHAS, low, high, color=color, alpha=0.15, lw=0)
    axes.plot(ALPHAS, median, color=color, lw=1.7, linestyle=ANCHOR, label=label)
    axes.plot(ALPHAS, diagnosis.curves[quantity, SPREAD][:, 1], color=color, lw=1.7, linestyle=SYNTHETIC)
    axes.set_xlim(0, 1)
    axes.set_xlabel("α", color=MUTED, labelpad=1)


def _draw_magnitudes(axes, diagnosis: Diagnosis) -> None:
    """The bins of difficulty side by side, each labelled with its mean reward and its number of groups."""
    bins = range(len(diagnosis.difficulty))
    for (alpha, ratios), color in zip(diagnosis.magnitudes.items(), COLORS[2:], strict=False):
        low, median, high = ratios.T.numpy()
        axes.fill_between(bins, low, high, color=color, alpha=0.15, lw=0)
        axes.plot(bins, median, color=color, lw=1.7, marker="o", ms=4, label=f"α {alpha:g}")
    axes.axhline(1, color=MUTED, lw=0.8, linestyle=LINE_STYLES[2])
    sizes = zip(diagnosis.difficulty.tolist(), diagnosis.bin_sizes.tolist(), strict=True)
    axes.set_xticks(bins, [f"{mean:.3g}\nn = {size}" for mean, size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("mean reward of the group (n groups), hard to easy", color=MUTED, labelpad=1)
