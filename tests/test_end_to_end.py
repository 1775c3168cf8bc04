"""The real stack, end to end: Ray, DeepSpeed, vLLM, math-verify, by the command a user types. Untrained model, dense
reward: what is tested is the machinery."""

import json
import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from real_runs import DIGITS_REWARD, MODULE, succeed, train, weight_error, without_clock
from safetensors.torch import load_file

from openrlhf_apo.trainer.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RESUMABLE = [
    "--ckpt.save_steps",
    "1",
    "--apo.anchor",
    "ema",
    "--apo.anchor_beta",
    "0.9",
    "--apo.confidence",
    "relative",
]


EVALUATION = ["--eval.steps", "3", "--eval.ends", "--eval.temperature", "0", "--eval.n_samples_per_prompt", "1"]


@pytest.fixture(scope="module")
def guarded(flags, sums, tmp_path_factory) -> Path:
    """The uninterrupted run that others are compared with: guarded, EMA anchor, evaluations, saved rollouts."""
    out = tmp_path_factory.mktemp("guarded")
    evaluation = ["--eval.dataset", sums, *EVALUATION]
    rows = succeed(flags, out, *RESUMABLE, *evaluation, "--apo.save_rollouts", str(out / "rollouts"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    return out


def test_guarded_run_writes_what_others_rely_on(guarded):
    rows = read_metrics(guarded / "metrics.jsonl")
    keys = """reward_mean reward_std alpha confidence improvement reward_baseline reward_scale ess divergence entropy_p
    entropy_q max_weight zero_variance_fraction log_ratio_std rollout_mismatch grad_norm response_length
    truncated_fraction reward_failures tokens_per_s time/generate time/update inner/alpha
    inner/log_ratio_std""".split()
    for row in rows[1:]:
        assert [key for key in keys if key not in row] == []
        assert "ess_outcome" not in row
        assert len(row["inner/alpha"]) == 2
    assert [row["step"] for row in rows if "eval/pass1" in row] == [0, 3, 6]
    assert rows[-1]["log_ratio_std"] > 0 and rows[-1]["confidence"] > 0
    assert all(row["rollout_mismatch"] < 1e-3 for row in rows[1:])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in guarded.iterdir()}


def test_a_dead_engine_ends_the_run_and_resumed_it_logs_what_the_uninterrupted_one_logs(
    flags, sums, guarded, tmp_path
):
    evaluation = ["--eval.dataset", sums, *EVALUATION]
    where = ["--ckpt.output_dir", str(tmp_path), "--ckpt.path", str(tmp_path / "ckpt")]
    command = [*MODULE, *flags, "--runtime", "ray", *RESUMABLE, *evaluation, *where]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    marker = tmp_path / "ckpt" / "_actor" / "latest"
    deadline = time.time() + 200
    while not (marker.exists() and marker.read_text() >= "global_step3"):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    engines = [p for p in psutil.process_iter(["cmdline"]) if "ray::RolloutActor" in " ".join(p.info["cmdline"] or [])]
    ours = [p for p in engines if process.pid in [parent.pid for parent in p.parents()]]
    assert len(ours) == 1
    ours[0].kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    *_, kept, last = stderr.strip().splitlines()
    assert last.startswith("error: ") and "its actor died (process " in last and "goes on from there" in kept
    rows = succeed(flags, tmp_path, *RESUMABLE, *evaluation, "--ckpt.load_enable")
    assert without_clock(rows) == without_clock(read_metrics(guarded / "metrics.jsonl"))
    resumed, straight = (load_file(path / "model.safetensors") for path in (tmp_path, guarded))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_two_ranks_on_ray_train_the_weights_of_one_embedded(training_flags, guarded, tmp_path):
    common = [
        *training_flags,
        "--apo.load_rollouts",
        str(guarded / "rollouts"),
        "--alpha_mode",
        "ess",
        "--actor.adam.eps",
        "1e-2",
    ]
    ranks = ["--actor.num_gpus_per_node", "2", "--ds.zero_stage", "3", "--train.micro_batch_size", "3"]
    two = succeed(common, tmp_path / "two", *ranks)
    one = succeed(common, tmp_path / "one", "--train.micro_batch_size", "32", runtime="embedded")
    assert weight_error(tmp_path / "one", tmp_path / "two") <= 1e-5
    for a, b in zip(one, two, strict=True):
        assert a["inner/alpha"] == pytest.approx(b["inner/alpha"], abs=1e-6)
        assert a["ess_outcome"] == b["ess_outcome"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["lr"] == b["lr"]


def test_ess_from_the_engine(flags, tmp_path):
    rows = succeed(flags, tmp_path, "--alpha_mode", "ess", "--data.max_samples", "16", runtime="embedded")
    assert {row["ess_outcome"] for row in rows} <= {"root", "clamped_hi", "clamped_lo", "skipped"}
    assert all("confidence" not in row for row in rows)


def test_bad_rewards_stop_the_run_or_cost_their_group(flags, tmp_path):
    reward = tmp_path / "bad.py"
    reward.write_text(
        DIGITS_REWARD + "\ngood = reward_func\n\ndef reward_func(queries, prompts, labels, **kwargs):\n"
        '    if prompts[0] == "3+2=":\n        raise RuntimeError("no reward for this one")\n'
        "    return good(queries, prompts, labels)\n"
    )
    result = train(flags, tmp_path / "a", "--reward.remote_url", str(reward), runtime="embedded")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "raised RuntimeError: no reward for this one (prompt '3+2='" in line
    more = ["--reward.remote_url", str(reward), "--reward.max_failures", "8"]
    rows = succeed(flags, tmp_path / "b", *more, runtime="embedded")
    assert rows[-1]["reward_failures"] == 8


def test_an_engine_that_cannot_start_ends_the_run(flags, tmp_path):
    result = train(flags, tmp_path, "--data.max_len", "100000")  # more than the model's positions
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: the start of the policy and the engine failed") and "max_model_len" in last


def test_ray_job_submit(flags, tmp_path):
    script = Path(__file__).parents[1] / "examples" / "scripts" / "ray_job_submit.sh"
    out = ["--runtime", "ray", "--ckpt.output_dir", str(tmp_path / "out"), "--data.max_samples", "8"]
    environment = os.environ | {"NUM_GPUS": "2"}
    result = subprocess.run(
        ["bash", str(script), *flags, *out], capture_output=True, text=True, timeout=280, env=environment
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1]
    json.loads((tmp_path / "out" / "config.json").read_text())
