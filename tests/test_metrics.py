"""metrics.jsonl: strict JSON on disk after every step, one run per file, nothing lost or invented on resume."""

import json
import logging

import numpy as np
import pytest
import torch

from openrlhf_apo.trainer.metrics import MetricsFile, first_and_last_fifth, read_metrics


def write_steps(path, steps, **settings):
    file = MetricsFile(path, **settings)
    for step in steps:
        file.write({"step": step, "reward_mean": step / 10})


def steps_of(path):
    return [row["step"] for row in read_metrics(path)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def test_a_line_is_strict_json_and_on_disk_at_once(path):
    file = MetricsFile(path)
    file.write({"eval/pass1": 0.25, "step": 0})
    file.write(
        {
            "step": torch.tensor(1),
            "reward_mean": torch.tensor(0.5, dtype=torch.bfloat16),
            "alpha": np.float32(0.75),
            "reward_failures": np.int64(3),
            "ess_outcome": "clamped_hi",
            "inner/ess_outcome": ["root", {"root": torch.tensor(3), "skipped": 1}],
            "inner/alpha": [torch.tensor(0.5), np.float64(0.25), 1],
            "inner/grad_norm": torch.tensor([1.0, 2.0], requires_grad=True),
        }
    )
    first, second = path.read_text().splitlines()
    assert json.loads(first) == {"step": 0, "eval/pass1": 0.25}
    assert first.startswith('{"step": 0')
    assert json.loads(second) == {
        "step": 1,
        "reward_mean": 0.5,
        "alpha": 0.75,
        "reward_failures": 3,
        "ess_outcome": "clamped_hi",
        "inner/ess_outcome": ["root", {"root": 3, "skipped": 1}],
        "inner/alpha": [0.5, 0.25, 1],
        "inner/grad_norm": [1.0, 2.0],
    }


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), torch.tensor(float("nan")), np.float32("inf"), [0.1, float("nan")]]
)
def test_a_value_that_is_not_finite_is_refused_by_name_and_leaves_the_file_alone(path, value):
    file = MetricsFile(path)
    file.write({"step": 1, "alpha": 0.9})
    with pytest.raises(ValueError, match="`grad_norm` at step 2 is (nan|-?inf)"):
        file.write({"step": 2, "alpha": 0.8, "grad_norm": value})
    assert read_metrics(path) == [{"step": 1, "alpha": 0.9}]
    file.write({"step": 2, "alpha": 0.8})
    assert steps_of(path) == [1, 2]


@pytest.mark.parametrize("value", [None, {"root": None}, {3}])
def test_a_value_that_is_no_number_is_refused_by_name(path, value):
    with pytest.raises(ValueError, match="`confidence` at step 4"):
        MetricsFile(path).write({"step": 4, "confidence": value})
    assert not path.exists()


def test_steps_increase(path):
    file = MetricsFile(path)
    file.write({"step": 0})
    file.write({"step": 3})
    for step in (3, 2, 0, -1, 4.0, True, "4"):
        with pytest.raises(ValueError, match="`step` must be an integer above 3"):
            file.write({"step": step})
    with pytest.raises(ValueError, match="`step`"):
        file.write({"alpha": 0.5})
    assert steps_of(path) == [0, 3]


def test_resume_drops_the_steps_after_the_checkpoint_and_goes_on(path):
    write_steps(path, range(6))
    write_steps(path, [4, 5, 6], resume_step=3)
    assert steps_of(path) == [0, 1, 2, 3, 4, 5, 6]
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_resume_refuses_a_step_before_the_checkpoint(path):
    write_steps(path, range(3))
    with pytest.raises(ValueError, match="above 5"):
        write_steps(path, [4], resume_step=5)


def test_resume_keeps_every_value_as_it_was(path):
    file = MetricsFile(path)
    file.write({"step": 1, "reward_mean": 0.1 + 0.2, "inner/alpha": [1 / 3, 1e-300]})
    before = path.read_bytes()
    MetricsFile(path, resume_step=1)
    assert path.read_bytes() == before


def test_a_torn_last_line_is_left_out_and_dropped_on_resume(path, caplog):
    write_steps(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING):
        assert steps_of(path) == [1, 2]
    assert "torn" in caplog.text
    write_steps(path, [3, 4], resume_step=2)
    assert steps_of(path) == [1, 2, 3, 4]
    assert path.read_text().count("\n") == 4


def test_a_last_line_that_lacks_only_its_newline_counts(path):
    write_steps(path, [1, 2])
    path.write_bytes(path.read_bytes()[:-1])
    assert steps_of(path) == [1, 2]
    write_steps(path, [3], resume_step=2)
    assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("bad", ['{"step": 2, "alp', '{"step": 2, "alpha": NaN}', '{"alpha": 1}', "[2]", ""])
def test_damage_before_the_last_line_is_an_error_that_names_the_line(path, bad):
    path.parent.mkdir()
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_metrics(path)


def test_a_new_run_moves_the_old_file_aside(path, caplog):
    write_steps(path, [1, 2])
    with caplog.at_level(logging.WARNING):
        write_steps(path, [1])
    assert "moved to metrics.jsonl.1" in caplog.text
    write_steps(path, [1, 2, 3])
    aside = path.with_name("metrics.jsonl.1"), path.with_name("metrics.jsonl.2")
    assert [steps_of(file) for file in (path, *aside)] == [[1, 2, 3], [1, 2], [1]]


def test_resume_without_a_file_or_with_a_gap_says_so(path, caplog):
    with caplog.at_level(logging.WARNING):
        write_steps(path, [6], resume_step=5)
    assert "steps 1 to 5 are lost" in caplog.text
    with caplog.at_level(logging.WARNING):
        write_steps(path, [9], resume_step=8)
    assert "ends before step 8" in caplog.text


def test_first_and_last_fifth():
    assert first_and_last_fifth([1.0]) == (1.0, 1.0, 1)
    assert first_and_last_fifth([float(i) for i in range(14)]) == (0.5, 12.5, 2)
    assert first_and_last_fifth([1.0, 2.0, 9.0] + [0.0] * 12, max) == (9.0, 0.0, 3)
