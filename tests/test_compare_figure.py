"""The pictures of a comparison: which there are, what their curves and bands show, and that nothing covers another."""

import pytest
from metrics_rows import rewards_as_rows, synthetic_run

from openrlhf_apo.analysis.compare_figure import build_figures
from openrlhf_apo.analysis.compare_results import write_results
from openrlhf_apo.analysis.compare_runs import Run
from openrlhf_apo.trainer.metrics import MetricsFile


def fabricate(out, modes: dict[str, str], seeds=(1, 2, 3), crashed=()) -> list[Run]:
    runs = []
    for i, (arm, mode) in enumerate(modes.items()):
        for seed in seeds:
            run = Run(out, arm, seed, ["--loss", mode])
            fails = (arm, seed) in crashed
            run.write_record(exit_code=int(fails), error="out of luck" if fails else "")
            file = MetricsFile(run.dir / "metrics.jsonl")
            for row in synthetic_run(mode, 20, 10 * seed + i)[: 8 if fails else None]:
                if "eval/pass1" in row:
                    row["eval/pass8"] = row["eval/pass1"] + 0.1
                file.write(row)
            runs.append(run)
    return runs


ALL_MODES = {"apo_ess": "ess", "apo_fixed": "fixed", "apo_guarded": "guarded", "grpo": "grpo"}
TITLES = {
    "reward": ["Reward", "Held-out pass@1", "Held-out pass@k"],
    "alpha": [
        "Divergence order α",
        "Confidence $c_t$",
        "Improvement $p_t$",
        "Effective sample size / P",
        "Share of α at a bound",
    ],
    "entropy": ["Entropy of the policy p", "Entropy of the target q", "Spread of the log-ratios"],
}


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_figures_of_arms_of_every_kind(tmp_path):
    runs = fabricate(tmp_path, ALL_MODES, crashed=[("grpo", 2)])
    table = write_results(runs, 0.5, None, tmp_path)
    assert "2 of 3, rest crashed" in table
    figures = build_figures({run: run.rows() for run in runs})
    assert {topic: titles(figure) for topic, figure in figures.items()} == TITLES
    for topic in TITLES:
        assert (tmp_path / f"figure_{topic}.png").stat().st_size > 10_000
        assert f"](figure_{topic}.png)" in (tmp_path / "results.md").read_text()
    labels = [text.get_text() for text in figures["reward"].legends[0].get_texts()]
    assert labels == ["apo_ess", "apo_fixed", "apo_guarded", "grpo (1 crashed)"]
    assert "grpo (1 crashed)" not in [text.get_text() for text in figures["alpha"].legends[0].get_texts()]


def test_token_losses_alone_have_no_picture_of_alpha(tmp_path):
    runs = fabricate(tmp_path, {"grpo": "grpo"}, seeds=[1])
    write_results(runs, None, None, tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["figure_reward.png"]


def axes_of_rewards(tmp_path, seeds: int):
    """Runs with a constant reward of 0.1 times their seed; that of the last seed crashed."""
    runs = [Run(tmp_path, "a", seed, []) for seed in range(1, seeds + 1)]
    rows = {run: rewards_as_rows([0.1 * run.seed] * (3 if run.seed == seeds else 5)) for run in runs}
    for run in runs:
        run.write_record(exit_code=int(run.seed == seeds), error="")
    return build_figures(rows)["reward"].axes[0]


def test_curves_are_means_over_finished_seeds_which_are_thin_lines(tmp_path):
    axes = axes_of_rewards(tmp_path, 3)
    one, other, crash, mean = axes.lines
    assert crash.get_ydata() == pytest.approx([0.3] * 3) and crash.get_marker() == "x"
    assert mean.get_ydata() == pytest.approx([0.15] * 5)
    assert [line.get_ydata()[0] for line in (one, other)] == pytest.approx([0.1, 0.2])
    assert one.get_linewidth() < mean.get_linewidth() / 2 and not axes.collections


def test_from_four_finished_seeds_there_is_a_band(tmp_path):
    axes = axes_of_rewards(tmp_path, 5)
    crash, mean, *edges = axes.lines
    assert mean.get_ydata() == pytest.approx([0.25] * 5) and len(edges) == 2
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    half = 3.1824 * (0.05 / 3) ** 0.5 / 4**0.5
    assert (band.min(), band.max()) == pytest.approx((0.25 - half, 0.25 + half))


def test_nothing_written_on_a_page_covers_something_else(tmp_path):
    names = {f"{name}_with_a_long_name": mode for name, mode in ALL_MODES.items()} | ALL_MODES
    for figure in build_figures({run: run.rows() for run in fabricate(tmp_path, names)}).values():
        figure.canvas.draw()
        texts = [text for axes in figure.axes for text in (axes._left_title, *axes.texts, *axes.get_yticklabels())]
        texts = [text for text in texts if text.get_text()] + figure.texts + figure.legends
        boxes = [(axes, axes.bbox) for axes in figure.axes] + [(text, text.get_window_extent()) for text in texts]
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1, text
            for other, other_box in boxes[:i]:
                assert not box.overlaps(other_box), (text, other)
