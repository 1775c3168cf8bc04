"""The rules of the verdict, each on metrics made up for it."""

import numpy as np
import pytest
from metrics_rows import rewards_as_rows, synthetic_run

from openrlhf_apo.analysis.verdict import alpha, equal_rewards, gradient, learning, mismatch, truncation, verdict


def rows(**values) -> list[dict]:
    """A line per value of each list."""
    return [
        {"step": step, **dict(zip(values, each, strict=True))}
        for step, each in enumerate(zip(*values.values(), strict=True), start=1)
    ]


def noise(count: int, seed: int) -> np.ndarray:
    return 0.05 * np.random.default_rng(seed).normal(size=count)


def test_a_rise_above_the_noise_is_learning_and_a_fall_is_said():
    up = rewards_as_rows(np.linspace(0.2, 0.6, 40) + noise(40, 0))
    found = learning(up)
    assert found.level == "good" and found.text.startswith("It learns: the reward went from 0.")
    assert "last fifth of the rollouts (8)" in found.rule
    down = rewards_as_rows(np.linspace(0.6, 0.2, 40) + noise(40, 0))
    assert learning(down).level == "look" and learning(down).text.startswith("It gets worse")


def test_noise_alone_is_seldom_called_learning():
    levels = [learning(rewards_as_rows(0.5 + noise(40, seed))).level for seed in range(200)]
    assert levels.count("good") < 12  # 2.3 % of a normal distribution is above 2 standard errors
    assert learning(rewards_as_rows([0.5] * 20)).text.startswith("It does not show that it learns")


def test_the_numbers_of_learning_by_hand():
    """First and last fifth 0.1 and 0.5; differences 0 but for one of 0.4, whose deviation is 0.4 / 3."""
    found = learning(rewards_as_rows([0.1] * 5 + [0.5] * 5))
    error = 0.4 * np.std([1] + [0] * 8, ddof=1) / 2**0.5 * (2 / 2) ** 0.5
    assert f"0.100 to 0.500 (+0.400; 2 standard errors: {2 * error:.3f})" in found.text and found.level == "good"


def test_a_short_run_is_not_judged():
    assert learning(rewards_as_rows([0.1, 0.9])).text == "Too short to tell whether it learns: 2 of 10 rollouts."


def test_alpha_that_does_not_move_names_what_holds_it():
    still = {"alpha": [0.9, 0.89, 0.9]}
    found = alpha(rows(**still, confidence=[0.01] * 3, improvement=[0.5] * 3))
    assert found.text == "α hardly moves (0.890 to 0.900) because the confidence is 0.01." and found.level == "note"
    assert "because the improvement is 0.05" in alpha(rows(**still, confidence=[0.4] * 3, improvement=[0.05] * 3)).text
    assert "it follows them slowly" in alpha(rows(**still, confidence=[0.4] * 3, improvement=[0.5] * 3)).text
    moving = rows(alpha=[0.9, 0.88], confidence=[0.01] * 2, improvement=[0.5] * 2)
    assert alpha(moving).text == "α moves, between 0.880 and 0.900."
    assert alpha(rows(alpha=[0.6, 0.6])) is None  # fixed


@pytest.mark.parametrize("share, level", [(0.1, "good"), (0.3, "note"), (0.75, "look")])
def test_groups_that_teach_nothing(share, level):
    found = equal_rewards(rows(zero_variance_fraction=[share - 0.1, share + 0.1]))
    assert found.text == f"{share:.0%} of the groups teach nothing (equal rewards)." and found.level == level


def test_answers_cut_off_are_those_of_the_end():
    assert truncation(rows(truncated_fraction=[0.9] * 8 + [0.05] * 2)).level == "good"
    found = truncation(rows(truncated_fraction=[0.0] * 8 + [0.25, 0.35]))
    assert found.level == "look" and found.text == "30% of the answers are cut off at the length limit."


def test_mismatch_is_rounding_or_small_or_grows_or_large():
    assert mismatch(rows(rollout_mismatch=[3e-7] * 10)).text.endswith("3e-07, rounding.")
    small = mismatch(rows(rollout_mismatch=[0.004] * 10))
    assert small.level == "good" and small.text == "Engine and trainer differ by 0.004 nats per token."
    grown = mismatch(rows(rollout_mismatch=[0.004] * 5 + [0.02] * 5))
    assert grown.level == "look" and grown.text.endswith("0.02 nats per token, grown from 0.004.")
    assert mismatch(rows(rollout_mismatch=[0.2] * 10)).level == "look"
    assert mismatch(rows(rollout_mismatch=[1e-7] * 5 + [5e-7] * 5)).level == "good"


def test_gradient_norm_is_steady_or_grows_or_is_0():
    spiky = [1.0] * 9 + [100.0]
    assert gradient(rows(grad_norm=spiky + [1.0] * 10)).level == "good"
    grows = gradient(rows(grad_norm=[1.0] * 5 + [4.0] * 5))
    assert grows.level == "look" and "from 1 to 4: lower --actor.adam.lr" in grows.text
    assert gradient(rows(grad_norm=[1.0] * 8 + [0.0] * 2)).text.startswith("The gradient is 0")


def test_a_run_is_judged_by_the_metrics_it_has():
    assert len(verdict(synthetic_run("guarded"))) == 6
    assert len(verdict(synthetic_run("grpo"))) == 5
    assert verdict([{"step": 0, "eval/pass1": 0.2}]) == []
