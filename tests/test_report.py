"""The report: one picture and one table from metrics.jsonl, for runs of every mode."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from metrics_rows import synthetic_run

from openrlhf_apo.analysis.report import summary
from openrlhf_apo.analysis.report_figure import build_figure
from openrlhf_apo.trainer.metrics import MetricsFile

REPOSITORY = Path(__file__).parents[1]
ALWAYS = [
    "Rollout mismatch",
    "Gradient norm",
    "Response length",
    "Samples that teach little",
    "Where the time goes",
]
APO = [
    "Effective sample size / P",
    "Entropy over a group",
    "Divergence to the target",
    "Spread of the log-ratios",
    *ALWAYS,
]
PANELS = {
    "guarded": ["Reward", "Divergence order α", "What moves α", *APO],
    "ess": ["Reward", "Divergence order α", *APO],
    "fixed": ["Reward", "Divergence order α", *APO],
    "grpo": ["Reward", *ALWAYS],
}


def save(run_dir, rows):
    file = MetricsFile(run_dir / "metrics.jsonl")
    for row in rows:
        file.write(row)
    return run_dir


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def report(*arguments):
    return run_python("-m", "openrlhf_apo.cli.report", *map(str, arguments))


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left") == title)


@pytest.mark.parametrize("mode", PANELS)
def test_a_run_has_the_panels_of_its_mode_and_fills_the_page(mode, tmp_path):
    figure, titles = build_figure({mode: synthetic_run(mode, n_steps=30)})
    assert titles == PANELS[mode]
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    right_edges = [axes.get_position().x1 for axes in figure.axes]
    assert right_edges[-1] == pytest.approx(max(right_edges))
    figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_written_on_the_page_covers_something_else():
    """Titles, readings, legends and phase names, in the layouts with most and with fewest panels."""
    first_column = [row | {"token_entropy": 2.0} for row in synthetic_run("guarded")]  # where the phases' names are
    for runs in (
        {"guarded": synthetic_run("guarded")},
        {"guarded": first_column},
        {mode: synthetic_run(mode) for mode in PANELS},
        {f"a run with a long name {seed}": synthetic_run("grpo", 30, seed) for seed in range(10)},
    ):
        figure, _ = build_figure(runs)
        figure.canvas.draw()
        texts = [text for axes in figure.axes for text in (axes._left_title, *axes.texts)]
        texts += [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.texts + figure.legends
        texts += panel(figure, "Where the time goes").get_yticklabels()
        boxes = [(axes, axes.bbox) for axes in figure.axes]
        boxes += [(text, text.get_window_extent()) for text in texts if text not in figure.axes[-1].texts]
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1, text
            for other, other_box in boxes[:i]:
                assert not box.overlaps(other_box), (text, other)


def test_curves_show_what_was_measured():
    rows = synthetic_run("guarded")
    figure, _ = build_figure({"run": rows})
    faint, bold = panel(figure, "Response length").lines
    lengths = [row["response_length"] for row in rows[1:]]
    assert faint.get_xdata().tolist() == list(range(1, 121))
    assert faint.get_ydata().tolist() == lengths
    assert bold.get_ydata()[60] == pytest.approx(np.mean(lengths[56:65]))

    evaluations = panel(figure, "Reward").lines[-1]
    assert evaluations.get_xdata().tolist() == [0, 20, 40, 60, 80, 100, 120]
    assert evaluations.get_ydata()[0] == 0.21


def test_values_inside_a_rollout_lie_between_its_step_and_the_next():
    rows = synthetic_run("guarded", n_steps=3)
    figure, _ = build_figure({"run": rows})
    x, y = panel(figure, "Divergence order α").lines[0].get_data()
    assert x[:5] == pytest.approx([1, 1.25, 1.5, 1.75, np.nan], nan_ok=True)
    assert y[5:9] == pytest.approx(rows[2]["inner/alpha"])


def test_clamped_steps_are_marked():
    rows = synthetic_run("ess")
    clamped = [row["step"] for row in rows if row.get("ess_outcome") == "clamped_hi"]
    assert 0 < len(clamped) < 120

    def marked(rows):
        axes = panel(build_figure({"run": rows})[0], "Effective sample size / P")
        return [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "^"]

    assert marked(rows) == [clamped]
    by_group = [row | {"ess_outcome": {"root": 1, row.get("ess_outcome", "root"): 2}} for row in rows]
    assert marked(by_group) == [clamped]
    axes = panel(build_figure({"run": rows})[0], "Effective sample size / P")
    assert r"at $\alpha_{max}$" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_time_is_seconds_per_step_and_accounts_for_all_of_it():
    rows = [
        {"step": 0, "time/eval": 4.0},
        {"step": 1, "time/generate": 2.0, "time/update": 1.0, "time/step": 3.5},
        {"step": 2, "time/generate": 4.0, "time/checkpointing": 0.5, "time/step": 5.0},
    ]
    figure, titles = build_figure({"run": rows})
    assert titles == ["Where the time goes"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert dict(zip(labels, widths, strict=True)) == {"generate": 3.0, "update": 0.5, "eval": 2.0, "other": 0.75}


def test_a_gradient_spike_gets_a_log_axis():
    calm = [{"step": step, "grad_norm": 1 + step / 100} for step in range(1, 20)]
    figure, _ = build_figure({"run": calm})
    assert figure.axes[0].get_yscale() == "linear"
    figure, _ = build_figure({"run": [*calm, {"step": 20, "grad_norm": 300.0}]})
    assert figure.axes[0].get_yscale() == "log"


def test_a_mismatch_of_rounding_stays_at_the_bottom_of_its_panel():
    rows = [{"step": step, "rollout_mismatch": value} for step, value in enumerate((3e-7, 0.0, 2e-7, 4e-7), start=1)]
    (axes,) = build_figure({"run": rows})[0].axes
    assert axes.get_yscale() == "log" and axes.get_ylim()[0] == 1e-8 and 1 < axes.get_ylim()[1] < 3
    limit, faint, bold = axes.lines
    assert limit.get_ydata() == [1.0, 1.0]
    assert faint.get_ydata().tolist() == [3e-7, 1e-8, 2e-7, 4e-7] and np.isfinite(bold.get_ydata()).all()
    assert "shaded: rounding" in axes.texts[0].get_text()
    (axes,) = build_figure({"run": [*rows, {"step": 5, "rollout_mismatch": 30.0}]})[0].axes
    assert axes.get_ylim()[1] > 30


def test_improvement_is_smoothed_over_five_rollouts_with_the_raw_values_faint():
    rows = synthetic_run("guarded", n_steps=20)
    raw = [row["improvement"] for row in rows[1:]]
    *_, faint, bold = panel(build_figure({"run": rows})[0], "What moves α").lines
    assert faint.get_ydata().tolist() == raw and faint.get_alpha() < 0.5
    assert bold.get_ydata()[10] == pytest.approx(np.mean(raw[8:13]))


def test_several_runs_share_the_panels_in_a_colour_each():
    runs = {mode: synthetic_run(mode, n_steps=30) for mode in PANELS}
    figure, titles = build_figure(runs)
    assert titles == PANELS["guarded"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(colors)) == 4
    bold = {line.get_color() for line in panel(figure, "Divergence order α").lines}
    assert bold == set(colors[:3])


def test_a_run_of_one_step_and_one_of_only_an_evaluation_can_be_drawn(tmp_path):
    for rows, titles in (
        ([{"step": 0, "eval/pass1": 0.2}], ["Reward"]),
        ([{"step": 0, "eval/score_mean": 0.2}], ["Reward"]),
        (synthetic_run("guarded", n_steps=1), PANELS["guarded"]),
    ):
        figure, drawn = build_figure({"run": rows})
        figure.savefig(tmp_path / "run.png")
        assert drawn == titles


def test_a_run_without_a_known_metric_is_refused():
    with pytest.raises(ValueError, match="no metric to draw"):
        build_figure({"run": [{"step": 1, "loss_of_face": 0.1}]})


def test_the_table_compares_first_and_last(tmp_path):
    rows = [{"step": 0, "eval/pass1": 0.25, "time/step": 5.0}]
    rows += [
        {"step": step, "reward_mean": step / 10, "alpha": 0.9, "time/step": 10.0, "tokens_per_s": 1200.0}
        for step in range(1, 11)
    ]
    rows[-1] |= {"eval/pass1": 0.5, "alpha": 0.65}
    run = save(tmp_path / "run", rows)
    (run / "config.json").touch()
    assert summary(run).splitlines() == [
        "                    first     last   change",
        "sampled reward      0.150    0.950   +0.800   mean over 2 of 10 steps",
        "held-out pass@1     0.250    0.500   +0.250   after steps 0 and 10",
        "α                   0.900    0.650   -0.250",
        "",
        "time             1 min 45 s, 10.00 s per step",
        "speed            1,200 tokens/s",
        f"checkpoint       {run}",
        f"metrics          {run}/metrics.jsonl",
    ]


def test_graded_rewards_have_a_held_out_score(tmp_path):
    rows = [{"step": 0, "eval/score_mean": 0.2}, {"step": 1, "reward_mean": 0.3, "eval/score_mean": 0.4}]
    assert "held-out score      0.200    0.400   +0.200   after steps 0 and 1" in summary(save(tmp_path / "run", rows))
    figure, _ = build_figure({"run": rows})
    assert "score" in [text.get_text() for text in panel(figure, "Reward").get_legend().get_texts()]


def test_the_table_of_a_run_that_has_only_been_evaluated(tmp_path):
    run = save(tmp_path / "run", [{"step": 0, "eval/pass1": 0.25, "time/step": 5.0}])
    assert "+0.000   after step 0 only" in summary(run)


def test_command_draws_one_run_into_its_directory(tmp_path):
    save(tmp_path / "first", synthetic_run("guarded", n_steps=10))
    done = report(tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "first/report.png").stat().st_size > 10_000
    assert "sampled reward" in done.stdout and "first/report.png" in done.stdout
    assert "It learns" in (tmp_path / "first/report.html").read_text(encoding="utf-8")
    assert done.stdout.endswith(f"first/report.png, written: {tmp_path}/first/report.html\n")


def test_command_lays_several_runs_over_each_other(tmp_path):
    for name in ("a/run", "b/run"):
        save(tmp_path / name, synthetic_run("fixed", n_steps=5))
    done = report(tmp_path / "a/run", tmp_path / "b/run", "--out", tmp_path / "pictures/both.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pictures/both.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*/run/*.png")) and not list(tmp_path.rglob("*.html"))
    assert done.stdout.count("sampled reward") == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ('{"step": 1, "rew', "is empty"),
        ('{"step": 1}\nnoise\n', "line 2: not valid JSON"),
        ('{"step": 1}\n', "no metric to draw"),
    ],
)
def test_command_without_metrics_says_so_in_one_line(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = report(tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.glob("*.png"))


def test_a_picture_under_another_name_is_refused(tmp_path):
    done = report(tmp_path, "--out", tmp_path / "run.html")  # where the page would take its place
    assert done.returncode == 2 and "run.html: a picture, so name it .png" in done.stderr


def test_importing_the_command_imports_neither_matplotlib_nor_torch():
    code = "import openrlhf_apo.cli.report, sys; sys.exit(bool({'matplotlib', 'torch'} & sys.modules.keys()))"
    assert run_python("-c", code).returncode == 0
