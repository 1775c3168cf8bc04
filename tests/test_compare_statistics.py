"""The numbers of a comparison, by hand: intervals over seeds, measures of a run, and the table they end in."""

import numpy as np
import pytest
from metrics_rows import rewards_as_rows

from openrlhf_apo.analysis.compare_results import differences_table, markdown_table
from openrlhf_apo.analysis.compare_statistics import (
    has_collapsed,
    mean_and_half_width,
    measure,
    steps_to_threshold,
    t_975,
)


def test_interval_of_three_seeds_by_hand():
    mean, half = mean_and_half_width([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.3027 / 3**0.5, abs=1e-4)  # s = 1, two degrees of freedom
    assert mean_and_half_width([5.0]) == (5.0, None)


def test_student_quantiles_are_those_of_the_tables():
    for degrees, quantile in {1: 12.706, 2: 4.303, 9: 2.262, 30: 2.042, 31: 2.0395, 60: 2.0003, 120: 1.9799}.items():
        assert t_975(degrees) == pytest.approx(quantile, abs=5e-4)


def test_threshold_is_reached_by_a_mean_of_three_steps():
    rewards = [0.1, 0.9, 0.1, 0.4, 0.5, 0.6, 0.7]
    assert steps_to_threshold(rewards_as_rows(rewards), 0.5) == 6
    assert steps_to_threshold(rewards_as_rows(rewards), 0.65) is None
    assert steps_to_threshold(rewards_as_rows([0.9, 0.9]), 0.5) is None
    assert steps_to_threshold([{"step": 0, "eval/pass1": 1.0}, *rewards_as_rows([0.5] * 3)], 0.5) == 3


def test_collapse_is_losing_more_than_half_of_the_gain():
    up = np.linspace(0.4, 0.8, 20)
    assert not has_collapsed(list(up))
    assert has_collapsed([*up, *np.linspace(0.8, 0.3, 10)])
    assert not has_collapsed([*up, *[0.7] * 10])
    assert not has_collapsed([0.5])
    assert not has_collapsed([0.5, 0.4])


@pytest.mark.parametrize("n_steps", [13, 45, 234])
def test_noise_alone_is_not_a_collapse(n_steps):
    rng = np.random.default_rng(0)
    flat = [has_collapsed(list(0.5 + 0.03 * rng.normal(size=n_steps))) for _ in range(300)]
    assert np.mean(flat) < 0.02


def test_measures_of_a_run_by_hand():
    rows = [{"step": 0, "eval/pass1": 0.1, "eval/pass4": 0.3, "time/step": 9.0}]
    rows += [row | {"time/step": 2.0} for row in rewards_as_rows(np.arange(1, 21) / 20)]
    rows[-1] |= {"eval/pass1": 0.5, "eval/pass4": 0.75, "eval/response_length": 7.0}
    assert measure(rows, 0.79) == {
        "steps": 20,
        "first_reward": pytest.approx(0.125),
        "final_reward": pytest.approx(0.925),
        "auc": pytest.approx(0.525),
        "collapsed": 0,
        "seconds": 49.0,
        "seconds_per_step": 2.0,
        "pass1": 0.5,
        "passk": 0.75,
        "k": 4,
        "steps_to_threshold": 17,
        **{"eval/pass1": 0.5, "eval/pass4": 0.75, "eval/response_length": 7.0},
    }
    assert "steps_to_threshold" not in measure(rows, None)
    graded = [{"eval/score_mean" if key == "eval/pass1" else key: row[key] for key in row} for row in rows]
    assert measure(graded, None)["score_mean"] == 0.5 and not {"pass1", "passk", "k"} & measure(graded, None).keys()


def test_entropy_alpha_and_guard_of_a_run_by_hand():
    rows = rewards_as_rows([0.5] * 10)
    for step, row in enumerate(rows):
        row |= {
            "token_entropy": 1.0 - step / 10,
            "alpha": 0.9 - step / 100,
            "confidence": 0.5,
            "improvement": step / 9,
        }
    found = measure(rows, None)
    assert found["final_entropy"] == pytest.approx(0.2) and found["final_alpha"] == pytest.approx(0.82)  # the last 3
    assert found["guard"] == pytest.approx(0.25)
    assert not {"final_entropy", "final_alpha", "guard"} & measure(rewards_as_rows([0.5] * 3), None).keys()


def test_table_counts_who_reached_and_who_collapsed():
    row = {"arm": "a", "status": "finished", "final_reward": 0.5, "auc": 0.4, "collapsed": 0}
    results = [
        row | {"seed": 1, "steps_to_threshold": 4, "final_reward": 0.4},
        row | {"seed": 2, "steps_to_threshold": 7, "final_reward": 0.6},
        row | {"seed": 3, "collapsed": 1},
        row | {"arm": "b", "seed": 1},
    ]
    table = markdown_table(results, 0.65).splitlines()
    assert table[0] == "| arm | runs | final reward | area under the curve | steps to 0.65 | collapsed | s / step |"
    assert table[2] == "| a | 3 | 0.500 ± 0.248 | 0.400 ± 0.000 | 5.5, by 2 of 3 | 1 of 3 |  |"
    assert table[3] == "| b | 1 | 0.500 | 0.400 | never, 0 of 1 | 0 of 1 |  |"


def test_differences_are_those_of_runs_with_the_same_seed():
    row = {"status": "finished", "auc": 0.5}
    results = [
        row | {"arm": "a", "seed": 1, "final_reward": 0.4, "eval/score_mean": 0.1, "eval/response_length": 3.0},
        row | {"arm": "a", "seed": 2, "final_reward": 0.6, "eval/score_mean": 0.3},
        row | {"arm": "a", "seed": 3, "final_reward": 0.9, "eval/score_mean": 0.9},
        row | {"arm": "b", "seed": 1, "final_reward": 0.5, "eval/score_mean": 0.2},
        row | {"arm": "b", "seed": 2, "final_reward": 0.8, "eval/score_mean": 0.2},
        row | {"arm": "b", "seed": 3, "status": "crashed", "final_reward": 0.0},
        row | {"arm": "c", "seed": 4, "final_reward": 0.5},
    ]
    table = differences_table(results, "a").splitlines()
    assert table[0] == "| minus a | final_reward | auc | eval/score_mean |"
    # 0.1 and 0.2: half of the interval is 12.706 * 0.05
    assert table[2] == "| b | +0.150 ± 0.635 | +0.000 ± 0.000 | +0.000 ± 1.271 |"
    assert table[3] == "| c |  |  |  |"
