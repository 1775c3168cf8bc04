"""Training that goes wrong: a run stops before it spends its time, and its checkpoints, on garbage."""

import json
import math
import shutil
from pathlib import Path

import pytest
from outcome import DATA, MODEL, REWARD, outcome
from safetensors.torch import load_file, save_file

from openrlhf_apo.errors import GroupError, RunError
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.owners import uses
from openrlhf_apo.trainer.health import IN_A_ROW, Health
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample, whole_groups

pytestmark = pytest.mark.filterwarnings("ignore")


def changed_model(model: str, tmp_path: Path, name: str, value: float) -> str:
    """A copy with one weight times `value`."""
    path = tmp_path / "model"
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    weights[name] = weights[name] * value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_stop_the_run_at_the_first_token(short, tiny_model, tmp_path, value):
    model = changed_model(tiny_model, tmp_path, "lm_head.weight", value)
    code, error = outcome(short, tmp_path / "out", MODEL, model)
    assert code == 1 and "its weights hold NaN or Inf" in error, error


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_weights_that_explode_stop_the_run(short, tmp_path, loss):
    code, error = outcome(
        short,
        tmp_path,
        "--loss",
        loss,
        "--actor.adam.lr",
        "1e6",
        "--train.num_episodes",
        "4",
        "--ckpt.save_steps",
        "1",
    )
    assert code == 1, error
    assert "not finite" in error or "gradient was exactly 0" in error or "entropy of the policy was 0" in error, error


def test_a_policy_that_is_certain_of_every_answer_stops_the_run(short, tiny_model, tmp_path):
    model = changed_model(tiny_model, tmp_path, "lm_head.weight", 1e5)
    code, error = outcome(short, tmp_path / "out", MODEL, model, "--train.num_episodes", "2")
    assert code == 1 and f"the entropy of the policy was 0 for {IN_A_ROW} rollouts" in error, error


def constant_reward(tmp_path: Path) -> str:
    path = tmp_path / "constant.py"
    path.write_text("def reward_func(queries, prompts, labels, **kwargs):\n    return {'rewards': [1.0]}\n")
    return str(path)


def test_equal_rewards_for_ever_are_warned_of_and_stop_the_run_by_flag(short, tmp_path, caplog):
    flags = [REWARD, constant_reward(tmp_path), "--train.num_episodes", "3"]
    assert outcome(short, tmp_path / "out", *flags) == (0, "")
    assert sum("every group had equal rewards for 3 rollouts" in line for line in caplog.messages) == 1
    code, error = outcome(short, tmp_path / "again", *flags, "--apo.max_equal_rollouts", "4")
    assert code == 1 and error.startswith("rollout 4: every group had equal rewards for 4 rollouts"), error


def test_equal_rewards_that_a_filter_drops_stop_the_run_too(short, tmp_path):
    flags = [REWARD, constant_reward(tmp_path), "--train.num_episodes", "3", "--algo.dynamic_filtering_enable"]
    code, error = outcome(short, tmp_path / "out", *flags, "--apo.max_equal_rollouts", "2")
    assert code == 1 and error.startswith("rollout 2: every group had equal rewards for 2 rollouts"), error


def healthy(step: int, **other) -> dict:
    row = {"step": step, "zero_variance_fraction": 0.5, "inner/grad_norm": [0.0, 0.1], "token_entropy": 1.0}
    return row | {"rollout_mismatch": 1e-6} | other


def test_what_happens_once_in_a_while_stops_no_run():
    health = Health(max_equal_rollouts=3)
    for step in range(1, 20):
        sign = [{}, {"zero_variance_fraction": 1.0, "inner/grad_norm": [0.0]}, {"token_entropy": 0.0}][step % 3]
        health.check(healthy(step, **sign))


def test_an_engine_whose_weights_are_not_the_policys_stops_the_run():
    with pytest.raises(RunError, match=r"differ by 1.5 nats per token .* --apo.max_mismatch 1"):
        Health().check(healthy(1, rollout_mismatch=1.5))
    Health(max_mismatch=2.0).check(healthy(1, rollout_mismatch=1.5))


def test_a_correction_that_keeps_no_sample_stops_the_run():
    health = Health()
    for step, shares in enumerate(([1.0, 1.0], [1.0, 1.0], [1.0, 0.9], [1.0, 1.0], [1.0, 1.0]), start=1):
        health.check(healthy(step, **{"inner/is_filtered_fraction": shares}))
    with pytest.raises(RunError, match="no sample was inside of --algo.advantage.is_correction_threshold"):
        health.check(healthy(6, **{"inner/is_filtered_fraction": [1.0], "inner/grad_norm": [0.0]}))


def test_a_resumed_run_counts_on():
    health = Health(max_equal_rollouts=2)
    health.check(healthy(1, zero_variance_fraction=1.0))
    resumed = Health(max_equal_rollouts=2)
    resumed.load_state_dict(json.loads(json.dumps(health.state_dict())))
    with pytest.raises(RunError, match="for 2 rollouts"):
        resumed.check(healthy(2, zero_variance_fraction=1.0))


def saved(path: Path, **other) -> str:
    samples = [
        Sample(g, f"{g}+1=", "", "", [2 + g, 12], [3, 1], "1", [-1.0, -1.0], False, reward=float(k % 2))
        for g in range(4)
        for k in range(4)
    ]
    samples[5] = Sample(**(samples[5].to_dict() | other))
    RolloutFiles(str(path)).write(1, samples)
    return str(path)


LOSSES = sorted({*GROUP_LOSSES, *TOKEN_LOSSES} - {"g2rpo_a"})  # whose guidance needs an engine


@pytest.mark.parametrize("loss", LOSSES)
def test_an_empty_answer_is_refused_whatever_the_loss(training_flags, tmp_path, loss):
    rollouts = saved(tmp_path / "rollouts", response_ids=[], rollout_log_probs=[])
    sizes = ["--rollout.n_samples_per_prompt", "4", "--rollout.batch_size", "4", "--train.batch_size", "16"]
    needs = ["--rollout.max_new_tokens", "4"] if uses(loss, "max_length") else []
    code, error = outcome(training_flags, tmp_path, *sizes, "--apo.load_rollouts", rollouts, "--loss", loss, *needs)
    assert (code, "group 1 has an empty response" in error) == (1, True), error


def test_a_token_outside_of_the_vocabulary_is_named(training_flags, tmp_path):
    rollouts = saved(tmp_path / "rollouts", response_ids=[3, 64])
    sizes = ["--rollout.n_samples_per_prompt", "4", "--rollout.batch_size", "4", "--train.batch_size", "16"]
    code, error = outcome(training_flags, tmp_path, *sizes, "--apo.load_rollouts", rollouts)
    assert code == 1 and "a sample has token 64, the policy only 64 tokens" in error, error


def test_a_partial_or_mixed_group_is_refused():
    sample = Sample(0, "p", "", "", [1], [2], "2", [-1.0], False)
    with pytest.raises(GroupError, match="has 1 of 2 samples"):
        whole_groups([sample], 2)
    with pytest.raises(GroupError, match="mixes prompts"):
        whole_groups([sample, Sample(0, "q", "", "", [1], [2], "2", [-1.0], False)], 2)


def test_answers_that_are_all_cut_off_still_train(short, tmp_path):
    assert outcome(short, tmp_path, "--rollout.max_new_tokens", "1") == (0, "")


DATA_FAULTS = {
    "empty": (b"", "is empty"),
    "one_row": (b'{"prompt": "1+1=", "label": "2"}\n', "are fewer than one --rollout.batch_size"),
    "wrong_column": (b'{"question": "1+1="}\n' * 8, "has no column 'prompt' (--data.input_key)"),
    "torn_line": (b'{"prompt": "1+1=", "label": "2"}\n' * 8 + b'{"prompt": "1', "cannot be read: "),
    "invalid_utf8": (b'{"prompt": "1+1=", "label": "\xff\xfe"}\n' * 8, "is not UTF-8"),
    "prompt_is_null": (b'{"prompt": null, "label": "2"}\n' * 8, "row 1 of"),
    "prompt_is_empty": (b'{"prompt": "1=", "label": "2"}\n{"prompt": "", "label": "2"}\n' * 8, "row 2 of"),
    "mixed_types": (b'{"prompt": "1+1=", "label": "2"}\n' * 7 + b'{"prompt": 7, "label": "2"}\n', "row 8 of"),
    "prompt_of_10_mb": (b'{"prompt": "' + b"1" * 10_000_000 + b'", "label": "2"}\n', "data.jsonl'"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_that_cannot_be_used_is_refused_with_the_place(short, tmp_path, fault):
    content, reason = DATA_FAULTS[fault]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    code, error = outcome(short, tmp_path / "out", DATA, str(path))
    assert code == 2 and reason in error, error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--data.label_key", "answer"], "no column 'answer'"),
        (["--data.max_len", "7"], "raise --data.max_len"),
        (["--data.apply_chat_template"], "no chat template: leave --data.apply_chat_template out"),
    ],
)
def test_flags_that_do_not_fit_the_data_are_refused(short, sums, tmp_path, more, reason):
    code, error = outcome(short, tmp_path, DATA, sums, *more)
    assert code == 2 and reason in error, error


def test_duplicate_prompts_are_groups_of_their_own(short, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "1+1=", "label": "2"}\n' * 8)
    assert outcome(short, tmp_path / "out", DATA, str(path)) == (0, "")
