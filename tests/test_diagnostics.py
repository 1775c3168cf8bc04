"""`report --diag`: the maths against brute force and autograd, and the command on rollouts made for the purpose."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_apo.analysis.diagnosis import (
    ALPHAS,
    PAPER_ALPHAS,
    SPREAD,
    diagnose,
    difficulty_bins,
    effective_curvature,
    estimator_noise,
    relative_magnitude,
)
from openrlhf_apo.analysis.diagnosis_figure import build_diagnosis_figure
from openrlhf_apo.analysis.diagnosis_report import load_rewards, save_diagnosis, table
from openrlhf_apo.cli.report import main
from openrlhf_apo.objectives import AlphaDivergenceLoss, GroupTargetBuilder, alpha_divergence, anchored_log_policy
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
REPOSITORY = Path(__file__).parents[1]
TAU, P = 0.8, 8
BINARY = torch.tril(torch.ones(P, P, dtype=torch.float64))[:-1]  # [7, P]: 1 to 7 right answers


def graded_groups(n_groups: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log_ratio[G, P] of that standard deviation, log_q[G, P]."""
    generator = torch.Generator().manual_seed(1)
    rewards = torch.rand(n_groups, P, generator=generator, dtype=torch.float64)
    log_ratio = spread * torch.randn(n_groups, P, generator=generator, dtype=torch.float64)
    return log_ratio, GroupTargetBuilder()(rewards)


def divergence_in_u(u: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """Equation 7 as it stands: u[P], log_q[P] -> D_alpha."""
    log_p = torch.log_softmax(u, dim=-1)
    return (1 - (alpha * log_q + (1 - alpha) * log_p).exp().sum()) / (alpha * (1 - alpha))


# ---- variance


@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("alpha", PAPER_ALPHAS)
@pytest.mark.parametrize("centred", [False, True])
def test_variance_is_that_of_the_estimates_of_every_answer(spread, alpha, centred):
    """Each answer's gradient from autograd, then their covariance, weighted by p."""
    log_ratio, log_q = graded_groups(4, spread)
    variance, signal = estimator_noise(log_ratio, log_q, alpha, TAU, centred=centred)
    for g in range(4):
        scores = torch.func.jacrev(lambda row: anchored_log_policy(row[None], TAU)[0])(log_ratio[g])  # [P, P]
        log_p = anchored_log_policy(log_ratio[g][None], TAU)[0]
        p, weight = log_p.exp(), ((log_q[g] - log_p) * alpha).exp()
        estimates = -(weight - centred * (p @ weight))[:, None] * scores / alpha
        covariance = torch.cov(estimates.T, correction=0, aweights=p)
        assert variance[g] == pytest.approx(covariance.trace().item(), rel=1e-10)
        assert signal[g] == pytest.approx((p @ estimates).square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_variance_and_mean_of_sampled_answers(spread):
    """Monte Carlo: answers drawn from p. The mean is the gradient that training uses."""
    log_ratio, log_q = graded_groups(1, spread)
    variance, signal = estimator_noise(log_ratio, log_q, 0.6, TAU, centred=False)
    log_p = anchored_log_policy(log_ratio, TAU)[0]
    p = log_p.exp()
    drawn = torch.multinomial(p, 400_000, replacement=True, generator=torch.Generator().manual_seed(2))
    estimates = -(0.6 * (log_q[0] - log_p)).exp()[:, None] * (torch.eye(P, dtype=torch.float64) - p) / (0.6 * TAU)
    assert estimates[drawn].var(dim=0).sum() == pytest.approx(variance.item(), rel=0.01)
    c = AlphaDivergenceLoss(TAU).coefficients(log_ratio, log_q, 0.6)
    assert signal.item() == pytest.approx(c.square().sum().item(), rel=1e-10)
    assert torch.allclose(estimates[drawn].mean(dim=0), c[0], atol=0.02)


def test_centring_leaves_the_mean_and_at_the_anchor_a_noise_of_p_minus_2():
    log_ratio, log_q = graded_groups(20, 0.0)
    for alpha in ALPHAS:
        plain, signal = estimator_noise(log_ratio, log_q, alpha, TAU, centred=False)
        centred, same_signal = estimator_noise(log_ratio, log_q, alpha, TAU, centred=True)
        assert torch.equal(signal, same_signal)
        assert (centred < plain).all()
        assert torch.allclose(centred / signal, torch.full_like(signal, P - 2))


# ---- curvature


@pytest.mark.parametrize("alpha", [0.05, *PAPER_ALPHAS, 1.0])
def test_curvature_is_one_at_the_target(alpha):
    _, log_q = graded_groups(10, 0.0)
    assert torch.allclose(effective_curvature(TAU * log_q, log_q, alpha, TAU), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("alpha", PAPER_ALPHAS)
def test_curvature_is_the_trace_of_the_hessian(alpha):
    """Closed form, autograd, and finite differences of the gradient that training uses."""
    log_ratio, log_q = graded_groups(5, 1.0)
    curvature = effective_curvature(log_ratio, log_q, alpha, TAU)
    assert not torch.allclose(curvature, torch.ones_like(curvature), atol=0.05)
    for g in range(5):
        u = log_ratio[g] / TAU
        fisher = 1 - torch.softmax(u, dim=-1).square().sum()
        hessian = torch.func.hessian(divergence_in_u)(u, log_q[g], alpha)
        assert curvature[g].item() == pytest.approx((hessian.trace() / fisher).item(), rel=1e-9)
        steps = 1e-5 * torch.eye(P, dtype=torch.float64)
        loss, target = AlphaDivergenceLoss(1.0), log_q[g].expand(P, P)
        change = loss.coefficients(u + steps, target, alpha) - loss.coefficients(u - steps, target, alpha)
        assert curvature[g].item() == pytest.approx((change.trace() / 2e-5 / fisher).item(), rel=1e-6)


def test_curvature_at_the_anchor_is_one_less_the_divergence():
    log_ratio, log_q = graded_groups(10, 0.0)
    for alpha in ALPHAS:
        expected = 1 - alpha * (1 - alpha) * alpha_divergence(log_q, anchored_log_policy(log_ratio, TAU), alpha)
        assert torch.allclose(effective_curvature(log_ratio, log_q, alpha, TAU), expected)


# ---- coefficients by difficulty


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.35, [1.153, 1.017, 0.938, 0.877, 0.818, 0.750, 0.645]),
        (0.6, [1.348, 1.063, 0.920, 0.818, 0.727, 0.631, 0.498]),
        (0.9, [1.714, 1.159, 0.924, 0.772, 0.649, 0.530, 0.385]),
    ],
)
@pytest.mark.parametrize("tau_anc", [0.8, 2.0])
def test_binary_rewards_reweight_by_difficulty(alpha, expected, tau_anc):
    """One to seven right answers of eight, beta_r = 1: worked out by hand for the notes on the algorithm."""
    ratio = relative_magnitude(GroupTargetBuilder()(BINARY), alpha, tau_anc)
    assert ratio.tolist() == pytest.approx(expected, abs=6e-4)


def test_as_alpha_vanishes_the_coefficients_are_those_of_reinforce():
    for beta_r in (0.3, 1.0):
        ratio = relative_magnitude(GroupTargetBuilder(beta_r)(BINARY), 1e-9, TAU)
        assert torch.allclose(ratio, torch.ones_like(ratio))


def test_bins_count_right_answers_and_span_graded_rewards():
    bins, mean = difficulty_bins(torch.cat([torch.zeros(1, P), BINARY, torch.ones(1, P)]))
    assert bins.tolist() == list(range(P + 1)) and mean[2] == 2 / P
    bins, _ = difficulty_bins(torch.tensor([[-1.0, -1.0], [-1.0, 3.0], [3.0, 3.0]]))
    assert bins.tolist() == [0, 1, 2]


# ---- diagnosis, figure and command


def write_rollouts(directory, rewards_by_step: list[list[list[float]]]) -> Path:
    """A rollout file per step; `rewards_by_step[step][group]` are the rewards of a group's answers."""
    group_id = 0
    for step, groups in enumerate(rewards_by_step, start=1):
        samples = []
        for rewards in groups:
            samples += [
                Sample(group_id, f"p{group_id}", "", "t", [2], [3, 4], "", [-1.0, -1.0], False, reward)
                for reward in rewards
            ]
            group_id += 1
        RolloutFiles(str(directory)).write(step, samples)
    return Path(directory)


def report(*arguments):
    command = [sys.executable, "-m", "openrlhf_apo.cli.report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def test_groups_of_equal_rewards_are_counted_and_left_out():
    equal = torch.full((3, P), 0.5, dtype=torch.float64)
    alone, mixed = diagnose(BINARY, 1.0, TAU), diagnose(torch.cat([equal, BINARY]), 1.0, TAU)
    assert (mixed.n_groups, mixed.n_varied, alone.n_varied) == (10, 7, 7)
    assert torch.equal(mixed.curves["variance", 0.0], alone.curves["variance", 0.0])
    assert mixed.bin_sizes.tolist() == [1] * 7
    assert mixed.magnitudes[0.9][:, 1].tolist() == pytest.approx(
        [1.714, 1.159, 0.924, 0.772, 0.649, 0.530, 0.385], abs=6e-4
    )


def test_synthetic_log_ratios_are_the_same_every_time_and_matter():
    first, second = diagnose(BINARY, 1.0, TAU), diagnose(BINARY, 1.0, TAU)
    off, on = first.curves["curvature", SPREAD], first.curves["curvature", 0.0]
    assert torch.equal(off, second.curves["curvature", SPREAD])
    assert not torch.allclose(off, on, atol=0.01)


def test_table_shows_medians_at_the_papers_alphas():
    lines = table(diagnose(BINARY, 1.0, TAU)).splitlines()
    assert lines[0].startswith("7 of 7 groups (100%)")
    assert next(line for line in lines if "centred" in line and "|E g|²" in line).split()[-5:] == [
        *["6.000"] * 3,
        "the",
        "same",
    ]
    assert "  mean reward 0.250                   1.017    1.063    1.159            1" in lines


def test_figure_draws_both_states_and_covers_nothing():
    diagnosis = diagnose(BINARY, 1.0, TAU)
    figure = build_diagnosis_figure(diagnosis, "run/rollouts")
    variance, _, curvature, magnitude = figure.axes
    assert [line.get_linestyle() for line in curvature.lines] == ["-", "--"]
    assert curvature.lines[1].get_ydata() == pytest.approx(diagnosis.curves["curvature", SPREAD][:, 1].numpy())
    assert len(variance.lines) == 4
    assert [label.get_text() for label in magnitude.get_xticklabels()][:2] == ["0.125\nn = 1", "0.25\nn = 1"]
    figure.canvas.draw()
    texts = [text for axes in figure.axes for text in (axes._left_title, *axes.texts, axes.get_legend()) if text]
    texts += [*figure.texts, *figure.legends]
    boxes = [*(axes.bbox for axes in figure.axes), *(text.get_window_extent() for text in texts)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("rewards", [[[0.0, 1.0]], [[0.0, 1.0, 0.3]], [[0.0] * 63 + [1.0]], [[1e6, -1e6, 0.0, 5.0]]])
@pytest.mark.parametrize("beta_r", [0.01, 1.0])
def test_any_group_can_be_drawn(rewards, beta_r, tmp_path):
    diagnosis = diagnose(torch.tensor(rewards), beta_r, TAU)
    build_diagnosis_figure(diagnosis, "one group").savefig(tmp_path / "one.png")
    assert all(curve.isfinite().all() for curve in diagnosis.curves.values())
    assert "nan" not in table(diagnosis)


def test_rewards_of_all_steps_and_directories_in_order(tmp_path):
    first = write_rollouts(tmp_path / "a", [[[0.0, 1.0], [1.0, 1.0]], [[0.5, 0.25]]])
    second = write_rollouts(tmp_path / "b", [[[0.0, 0.125]]])
    assert load_rewards([first, second]).tolist() == [[0.0, 1.0], [1.0, 1.0], [0.5, 0.25], [0.0, 0.125]]


def test_command_draws_beside_the_rollouts_and_prints_the_table(tmp_path):
    rollouts = write_rollouts(tmp_path / "rollouts", [BINARY.tolist(), [[1.0] * P]])
    done = report("--diag", rollouts)
    assert done.returncode == 0, done.stderr
    assert (rollouts / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    assert "7 of 8 groups (88%)" in done.stdout and "β_r 1, τ_anc 0.8" in done.stdout
    assert done.stdout.endswith(f"drawn: {rollouts}/diagnostics.png\n")

    done = report(
        rollouts, rollouts, "--diag", "--beta_r", "0.3", "--tau_anc", "2", "--out", tmp_path / "new/both.png"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new/both.png").exists()
    assert "14 of 16 groups" in done.stdout and "β_r 0.3, τ_anc 2" in done.stdout


def test_the_directory_of_a_run_stands_for_the_rollouts_in_it(tmp_path):
    rollouts = write_rollouts(tmp_path / "run" / "rollouts", [BINARY.tolist()])
    assert save_diagnosis([rollouts.parent], tmp_path / "a.png", 1.0, TAU) == save_diagnosis(
        [rollouts], tmp_path / "b.png", 1.0, TAU
    )


def torn(directory):
    path = write_rollouts(directory, [[[0.0, 1.0]]]) / "rollout_00001.jsonl"
    path.write_text(path.read_text()[:-20])


def incomplete(directory):
    path = write_rollouts(directory, [[[0.0, 1.0], [0.0, 1.0]]]) / "rollout_00001.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("prepare", "flags", "complaint"),
    [
        (lambda d: None, ["--diag"], "has no rollout_*.jsonl: give a directory that --apo.save_rollouts wrote"),
        (torn, ["--diag"], "rollout_00001.jsonl is not a saved rollout"),
        (incomplete, ["--diag"], "rollout_00001.jsonl: group 1 has 1 of 2 samples"),
        (lambda d: write_rollouts(d, [[]]), ["--diag"], "hold no samples"),
        (lambda d: write_rollouts(d, [[[1.0, 1.0]]]), ["--diag"], "none of the 1 groups has rewards that differ"),
        (
            lambda d: write_rollouts(d, [[[0.0, 1.0]]]),
            ["--diag", "--beta_r", "0"],
            "beta_r must be a number in (0, inf)",
        ),
        (lambda d: write_rollouts(d, [[[0.0, 1.0]]]), ["--diag", "--tau_anc", "-1"], "tau_anc must be a number in"),
        (lambda d: write_rollouts(d, [[[0.0, 1.0]]]), ["--beta_r", "1"], "have no effect without --diag: drop them"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, prepare, flags, complaint):
    prepare(tmp_path)
    assert main([str(tmp_path), *flags]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and complaint in err
    assert out == "" and not list(tmp_path.glob("*.png"))
