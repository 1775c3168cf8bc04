"""Agents by the command: turns sampled by vLLM, trained by a group loss and by OpenRLHF's own step; the example."""

from pathlib import Path

import pytest
from real_runs import succeed, weight_error
from test_agents import AGENT

from openrlhf_apo.data.tiny import build_tiny, calculator
from openrlhf_apo.trainer.rollout_files import RolloutFiles

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).parents[1]


def test_conversations_on_ray_train_a_group_loss_and_our_grpo_as_openrlhfs(training_flags, sums, tmp_path):
    """Of grpo, one optimizer step per rollout, where OpenRLHF's shuffling of single samples cannot matter."""
    (tmp_path / "agent.py").write_text(AGENT)
    saved = tmp_path / "rollouts"
    common = ["--rollout.n_samples_per_prompt", "4", "--actor.adam.eps", "1e-2"]
    group = ["--loss", "apo", "--apo.confidence", "relative", "--train.batch_size", "16"]
    sampled = ["--data.prompt_dataset", sums, "--data.max_samples", "16", "--data.max_len", "48"]
    sampled += ["--train.agent_func_path", str(tmp_path / "agent.py"), "--apo.save_rollouts", str(saved)]
    live = succeed(training_flags, tmp_path / "live", *common, *group, *sampled)
    samples = [sample for rollout in (1, 2) for sample in RolloutFiles(str(saved)).read(rollout)]
    assert len(samples) == 64 and any(False in (sample.own or ()) for sample in samples)
    assert len({tuple(sample.response_ids) for sample in samples}) > 60
    assert all(row["rollout_mismatch"] < 1e-3 and row["feedback_length"] > 1 for row in live)

    loaded = ["--apo.load_rollouts", str(saved), "--train.micro_batch_size", "16", *common]
    grpo = ["--loss", "grpo", "--algo.kl.init_coef", "0"]
    openrlhf = ["--loss", "openrlhf", "--algo.kl.init_coef", "0", "--actor.loss_agg_mode", "seq-mean-token-mean"]
    theirs = succeed(training_flags, tmp_path / "theirs", *loaded, *openrlhf)
    for name, loss, rows in (("live", group, live), ("theirs", grpo, theirs)):
        ours = succeed(training_flags, tmp_path / name / "ours", *loaded, *loss, runtime="embedded")
        assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-4)
        assert weight_error(tmp_path / name / "ours", tmp_path / name) <= 1e-5


def test_the_example_learns_to_ask_the_calculator(tmp_path):
    made = build_tiny(tmp_path / "calculator", calculator(0))
    flags = ["--config", str(ROOT / "configs" / "calculator_cpu.yaml"), "--actor.model_name_or_path", str(made.model)]
    flags += ["--data.prompt_dataset", str(made.train), "--eval.dataset", str(made.eval)]
    flags += ["--train.agent_func_path", str(ROOT / "examples" / "agents" / "calculator.py")]
    rows = succeed(flags, tmp_path / "out", "--data.max_samples", "384", runtime="embedded")  # 6 of its 15 rollouts
    for key in ("reward_mean", "reward/calls"):
        assert rows[-1][key] > rows[1][key] + 0.15, key
    assert rows[-1]["eval/pass1"] > rows[0]["eval/pass1"] + 0.2
