"""Stopped after any of its rollouts and resumed, a run logs and trains what the uninterrupted one does, bit by bit."""

import shutil
from pathlib import Path

import pytest
import torch
from outcome import outcome
from real_runs import without_clock
from safetensors.torch import load_file

from openrlhf_apo.trainer.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")

RUNS = {
    "guarded, EMA anchor": "--alpha_mode guarded --apo.confidence relative --apo.anchor ema --apo.anchor_beta 0.9",
    "ESS, lagged anchor, dynamic sampling": (
        "--alpha_mode ess --apo.anchor lagged --apo.anchor_interval 2 --algo.dynamic_filtering_enable "
        "--actor.lr_scheduler cosine --algo.kl.init_coef 0.1 --algo.kl.target 1e-3 --algo.kl.horizon 100"
    ),
    "guidance, KL": (
        "--loss g2rpo_a --guidance.enable --guidance.length 4 --algo.kl.target 1 --algo.kl.horizon 100 "
        "--algo.kl.unbiased_gradient"
    ),
    "bapo, epochs, average": (
        "--loss bapo --train.max_epochs 2 --actor.lr_scheduler linear --train.enable_ema --train.ema_beta 0.7"
    ),
    "surplus of an oversampled batch": (
        "--loss grpo --rollout.vllm_generate_batch_size 20 --algo.dynamic_filtering_enable"
    ),
    "asynchronous, surplus, KL": (
        "--train.async_enable --rollout.vllm_generate_batch_size 12 --algo.dynamic_filtering_enable --adrpo.enable"
    ),
    "asynchronous, the engine's log-probs, guidance": (
        "--loss grpo --train.async_enable --apo.old_log_probs engine --guidance.enable --guidance.length 4"
    ),
    "asynchronous, LoRA": "--loss gtpo --train.async_enable --ds.lora.rank 4 --actor.adam.lr 3e-2",
    "adrpo, entropy": "--loss grpo --adrpo.enable --actor.entropy_coef 0.01",
}


@pytest.mark.parametrize("run", RUNS)
def test_resumed_after_every_rollout_it_is_the_same_run(flags, sums, tmp_path, run):
    evaluated = ["--eval.dataset", sums, "--eval.steps", "2", "--ckpt.best_metric_key", "eval/pass1"]
    saved = ["--ckpt.save_steps", "1", "--ckpt.max_num", "9"]
    more = [*RUNS[run].split(), "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "16", *evaluated, *saved]
    straight = tmp_path / "straight"
    assert outcome(flags, straight, *more) == (0, "")
    rows = without_clock(read_metrics(straight / "metrics.jsonl"))
    assert len(rows) == rows[-1]["step"] >= 5  # 6, where dynamic sampling does not use up the prompts before
    if run.startswith("surplus"):
        assert all(row["surplus_groups"] for row in rows[:2]) and sum(row["stale_groups"] for row in rows) > 8
    for stopped in range(1, len(rows)):
        resumed = tmp_path / str(stopped)
        shutil.copytree(straight, resumed)
        drop_after(resumed, stopped)
        assert outcome(flags, resumed, *more, "--ckpt.load_enable") == (0, "")
        assert without_clock(read_metrics(resumed / "metrics.jsonl")) == rows, stopped
        for saved_model in straight.rglob("*model.safetensors"):  # the policy's or its adapter, and its average's
            a, b = load_file(saved_model), load_file(resumed / saved_model.relative_to(straight))
            assert all(torch.equal(a[name], b[name]) for name in a), stopped
        shutil.rmtree(resumed)


def drop_after(out: Path, rollout: int) -> None:
    """As if the run had been killed after its checkpoint of that rollout."""
    for folder in (out / "ckpt" / "_actor").iterdir():
        if folder.is_dir() and int(folder.name.rpartition("step")[2]) > rollout:
            shutil.rmtree(folder)
