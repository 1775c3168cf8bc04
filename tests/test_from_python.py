"""Training by one call from Python."""

import io
import json
import math

import pytest

import openrlhf_apo
from openrlhf_apo.errors import OptionError, RunError

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "rollout": {"batch_size": 4, "n_samples_per_prompt": 4, "max_new_tokens": 8},
    "train": {"batch_size": 8, "micro_batch_size": 8},
    "data.max_len": 48,
}
ROWS = [{"prompt": f"{i}+1=", "label": {"sum": i + 1}} for i in range(8)]


def digits(prompt: str, response: str, label: dict) -> float:
    return sum(c.isdigit() for c in response) / 8 + 0 * label["sum"]


def test_a_model_rows_and_a_function_train(tiny_model, tmp_path):
    rows = openrlhf_apo.train(
        tiny_model,
        ROWS,
        digits,
        output=str(tmp_path),
        held_out=ROWS[:2],
        console=io.StringIO(),
        loss="gspo",
        eval={"ends": True},
        **SIZES,
    )
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(row["grad_norm"]) and row["rollout_mismatch"] < 1e-5 for row in rows[1:])
    assert "eval/score_mean" in rows[0] and "eval/score_mean" in rows[2] and "eval/pass1" not in rows[2]
    assert {"config.json", "model.safetensors", "flags.yaml"} <= {path.name for path in tmp_path.iterdir()}


def test_what_is_wrong_is_one_line_as_on_the_command_line(tiny_model, tmp_path):
    with pytest.raises(OptionError, match="--apo.beta_r has no effect with --loss gspo"):
        openrlhf_apo.train(tiny_model, ROWS, digits, output=str(tmp_path), loss="gspo", apo={"beta_r": 1.0})
    for reward, wrong in (
        ({"timeout": 5.0}, "reward.timeout has no effect: the reward is the function"),
        ({"remote_url": "x.py"}, "reward.remote_url has no effect"),
        ({"max_failures": -1}, "reward.max_failures -1: must be a whole number"),
    ):
        with pytest.raises(OptionError, match=wrong):
            openrlhf_apo.train(tiny_model, ROWS, digits, output=str(tmp_path), reward=reward, **SIZES)
    for flag in ({"runtime": "ray"}, {"ckpt": {"output_dir": "elsewhere"}}):
        with pytest.raises(OptionError, match="is set by train itself, in this process"):
            openrlhf_apo.train(tiny_model, ROWS, digits, output=str(tmp_path), **flag, **SIZES)
    with pytest.raises(RunError, match="the reward raised KeyError: 'sum'"):
        rows = [{"prompt": "1+1=", "label": {"other": 2}}] * 4
        openrlhf_apo.train(tiny_model, rows, digits, output=str(tmp_path), console=io.StringIO(), **SIZES)


def test_failures_within_the_budget_cost_their_group(tiny_model, tmp_path):
    def fails_once(prompt, response, label):
        return digits(prompt, response, label) / (prompt != "0+1=")

    to = {"output": str(tmp_path), "console": io.StringIO(), "reward": {"max_failures": 8}}
    rows = openrlhf_apo.train(tiny_model, ROWS, fails_once, **to, **SIZES)
    assert [row["step"] for row in rows] == [1, 2] and rows[-1]["reward_failures"] == 4


def test_rows_need_no_label(tiny_model, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    seen = []

    def reward(prompt, response, label):
        seen.append(label)
        return len(response)

    openrlhf_apo.train(tiny_model, rows[:4], reward, output=str(tmp_path), console=io.StringIO(), **SIZES)
    assert set(seen) == {""}
    assert json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0]) == rows[0]
