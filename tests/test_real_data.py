"""GSM8K and MATH Level 3 through the whole pipeline: chat template, vLLM, math-verify, update."""

import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_apo.data.files import read_jsonl
from openrlhf_apo.data.warmup import build_model, build_tokenizer
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import RolloutFiles

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name, flags", [("gsm8k_train", []), ("math_level3_train", ["--level", "3"])])
def test_two_full_steps_on_real_problems(data_dir, tmp_path, name, flags):
    prepare = [sys.executable, "-m", "openrlhf_apo.data.math_prompts", "--dataset", str(data_dir / f"{name}.jsonl")]
    subprocess.run([*prepare, *flags, "--out", str(tmp_path), "--eval_size", "16"], check=True)
    texts = [row["prompt"] for row in read_jsonl(tmp_path / "train.jsonl")]
    tokenizer = build_tokenizer(texts[:500], 512)
    tokenizer.save_pretrained(tmp_path / "model")
    build_model(tokenizer, 64, 2, seed=0).save_pretrained(tmp_path / "model")
    command = [
        *(sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray", "--config", "configs/real_data_cpu.yaml"),
        *("--actor.model_name_or_path", str(tmp_path / "model")),
        *("--data.prompt_dataset", str(tmp_path / "train.jsonl")),
        *("--ckpt.output_dir", str(tmp_path / "out"), "--apo.save_rollouts", str(tmp_path / "rollouts")),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["reward_failures"] == 0 and row["rollout_mismatch"] < 1e-4 for row in rows)
    sample = RolloutFiles(str(tmp_path / "rollouts")).read(1)[0]
    assert sample.prompt.startswith("<|user|>") and sample.prompt.endswith("<|assistant|>")
    assert "\\boxed{}" in sample.prompt and sample.label
    assert tokenizer.decode(sample.prompt_ids, skip_special_tokens=False) == sample.prompt
