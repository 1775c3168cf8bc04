"""The real stack, end to end: Ray, DeepSpeed, vLLM, math-verify, by the command a user types. Untrained model, dense
reward: what is tested is the machinery."""

import json
import os
import shutil
import signal
import subprocess
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import torch
from real_runs import (
    DIGITS_REWARD,
    end,
    kill,
    start,
    succeed,
    train,
    wait_for,
    wait_for_rows,
    weight_error,
    without_clock,
)
from safetensors.torch import load_file

from openrlhf_apo.trainer.checkpoint_folder import complete_checkpoints
from openrlhf_apo.trainer.metrics import held_out, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RESUMABLE = (
    "--ckpt.save_steps 1 --apo.anchor ema --apo.anchor_beta 0.9 --apo.confidence relative --train.enable_ema"
).split()
EVALUATION = ["--eval.steps", "3", "--eval.ends", "--eval.temperature", "0", "--eval.n_samples_per_prompt", "1"]
# Waits while the metrics file that `gate` names has as many rows as it says.
GATED_REWARD = """
import json, time
from pathlib import Path

def reward_func(queries, prompts, labels, **kwargs):
    gate = Path(__file__).with_name("gate")
    while True:
        try:
            path, rows = json.loads(gate.read_text())
            if Path(path).read_bytes().count(b"\\n") < rows:
                break
        except FileNotFoundError:
            break
        gate.with_name("waiting").touch()
        time.sleep(0.02)
    return {"rewards": [sum(c.isdigit() for c in queries[0][len(prompts[0]):]) / 16]}
"""


@pytest.fixture(scope="module")
def gated(flags, sums, tmp_path_factory) -> tuple[list[str], Path]:
    """The flags of a run whose rewards wait, and the file that says for what."""
    reward = tmp_path_factory.mktemp("reward") / "gated.py"
    reward.write_text(GATED_REWARD)
    flags = [*flags, *RESUMABLE, "--eval.dataset", sums, *EVALUATION, "--reward.remote_url", str(reward)]
    return [*flags, "--reward.timeout", "100"], reward.with_name("gate")


@pytest.fixture(scope="module")
def guarded(gated, tmp_path_factory) -> Path:
    """The uninterrupted run that others are compared with: guarded, EMA anchor, evaluations."""
    out = tmp_path_factory.mktemp("guarded")
    rows = succeed(gated[0], out)
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
    assert [rollout for rollout, _ in held_out(rows)[1]] == [0, 3, 6]
    assert rows[-1]["log_ratio_std"] > 0 and rows[-1]["confidence"] > 0
    assert all(row["rollout_mismatch"] < 1e-3 for row in rows[1:])
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in guarded.iterdir()}


ENDS = {"ray::RolloutActor": 1, "gcs_server": 1, "raylet": 1, "SIGTERM": 143, "SIGKILL": -9}


def test_ended_after_every_rollout_by_every_fault_and_resumed_it_is_the_same_run(gated, guarded, tmp_path):
    """Each fault meets the run while it waits for the rewards of the next rollout; the next start goes on from there.
    In the end every metric but clocks, and every weight bit by bit, are those of the run that nothing met."""
    flags, gate = gated
    waiting = gate.with_name("waiting")
    for rollout, (victim, code) in enumerate(ENDS.items(), start=1):
        gate.write_text(json.dumps([str(tmp_path / "metrics.jsonl"), rollout + 1]))  # row 0 is an evaluation
        waiting.unlink(missing_ok=True)
        process = start(flags, tmp_path, *(["--ckpt.load_enable"] if rollout > 1 else []), runtime="ray")
        wait_for(process, waiting)
        if victim.startswith("SIG"):
            process.send_signal(signal.Signals[victim])
        else:
            kill(process, victim)
        gate.unlink()
        # Ray's own agents may look for a killed driver's Ray for another minute.
        found, lines = end(process) if victim != "SIGKILL" else (process.wait(60), [])
        assert found == code, (victim, found, lines[-4:])
        assert complete_checkpoints(tmp_path / "ckpt" / "_actor")[0].rollout == rollout
        if victim != "SIGKILL":
            assert "goes on from there" in lines[-2] and not any(line.startswith("Traceback") for line in lines)
            assert (
                lines[-1] == "error: stopped by SIGTERM"
                or "its actor died (" in lines[-1]
                or "gcs_server" in lines[-1]
            )
    rows = succeed(flags, tmp_path, "--ckpt.load_enable")
    assert without_clock(rows) == without_clock(read_metrics(guarded / "metrics.jsonl"))
    for model in ("model.safetensors", "ema/model.safetensors"):
        resumed, straight = (load_file(path / model) for path in (tmp_path, guarded))
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.fixture(scope="module")
def two_ranks(flags, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """Two ranks under ZeRO-3 and an engine: what they wrote, and the addresses that each process listened on."""
    out = tmp_path_factory.mktemp("two_ranks")
    more = ["--actor.num_gpus_per_node", "2", "--ds.zero_stage", "3", "--train.micro_batch_size", "3"]
    process = start([*flags, *GSPO, "--apo.save_rollouts", str(out / "rollouts")], out, *more, runtime="ray")
    wait_for_rows(process, out, 1)
    listening = {}
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        addresses = [socket.laddr.ip for socket in each.net_connections("inet") if socket.status == "LISTEN"]
        listening[f"{each.name()} {each.pid}"] = addresses
    code, lines = end(process)
    assert code == 0, lines[-5:]
    return out, listening


GSPO = ["--loss", "gspo", "--adrpo.enable", "--actor.entropy_coef", "1e-3", "--actor.adam.eps", "1e-2"]
GSPO += ["--train.enable_ema", "--train.ema_beta", "0.9"]


def test_nothing_of_a_run_on_this_machine_listens_beyond_loopback(two_ranks):
    """Two ranks, so that torch's store and gloo listen too. The embedded runtime opens no port: test_fault_job.py."""
    _, listening = two_ranks
    names = " ".join(name for name, addresses in listening.items() if addresses)
    assert "gcs_server" in names and "raylet" in names and "ray::Policy" in names, listening  # it can fail
    addresses = {address.removeprefix("::ffff:") for each in listening.values() for address in each}
    assert [address for address in addresses if not ip_address(address).is_loopback] == []


def test_two_ranks_on_ray_train_the_weights_of_one_embedded(training_flags, two_ranks, tmp_path):
    path, _ = two_ranks
    rows = read_metrics(path / "metrics.jsonl")
    assert all(row["rollout_mismatch"] < 1e-3 and row["entropy"] > 0 for row in rows)  # the engine has their weights
    assert rows[0]["inner/kl"][0] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 1e-6
    assert all(0 <= row["adrpo_beta_mean"] <= row["adrpo_beta_max"] <= 1 for row in rows)
    saved = ["--apo.load_rollouts", str(path / "rollouts"), "--train.micro_batch_size", "32"]
    one = succeed([*training_flags, *GSPO], tmp_path, *saved, runtime="embedded")
    assert weight_error(tmp_path, path) <= 1e-5
    assert weight_error(tmp_path / "ema", path / "ema") <= 1e-5 < weight_error(path / "ema", path)
    for a, b in zip(one, rows, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["lr"] == b["lr"]
        assert a["adrpo_beta_mean"] == pytest.approx(b["adrpo_beta_mean"], rel=1e-4)


ADAPTER = "adapter_model.safetensors"
LORA = "--ds.lora.rank 4 --actor.adam.lr 1e-2 --actor.adam.eps 1e-2 --apo.anchor ema --algo.kl.init_coef 0.01".split()


def test_with_lora_ray_and_embedded_train_one_adapter_and_the_engine_has_it_merged(flags, training_flags, tmp_path):
    ray, resumed, embedded = (tmp_path / name for name in ("ray", "resumed", "embedded"))
    more = ["--data.max_samples", "16", "--apo.save_rollouts", str(tmp_path / "rollouts"), "--apo.check_weights"]
    more += ["--ckpt.save_steps", "1"]
    rows = succeed([*flags, *LORA], ray, *more)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout_mismatch"] < 1e-4 for row in rows)
    assert rows[0]["kl"] > 1e-3  # so far from the base model is what sampled the second rollout
    saved = ["--apo.load_rollouts", str(tmp_path / "rollouts"), "--train.micro_batch_size", "32"]
    one = succeed([*training_flags, *LORA], embedded, *saved, runtime="embedded")
    assert weight_error(ray, embedded, ADAPTER) <= 1e-5
    assert [row["grad_norm"] for row in one] == pytest.approx([row["grad_norm"] for row in rows], rel=1e-4)
    shutil.copytree(ray, resumed)
    shutil.rmtree(resumed / "ckpt" / "_actor" / "global_step2")
    assert without_clock(succeed([*flags, *LORA], resumed, *more, "--ckpt.load_enable")) == without_clock(rows)
    assert weight_error(ray, resumed, ADAPTER) == 0
    assert not (ray / "model.safetensors").exists() and "Written by openrlhf_apo" in (ray / "README.md").read_text()


def test_a_base_in_4_bits_reaches_the_engine_as_the_policy_computes_with_it(flags, tmp_path):
    packed = ["--ds.load_in_4bit", "--ds.param_dtype", "bf16", "--ds.lora.rank", "4", "--apo.check_weights"]
    rows = succeed([*flags, *packed], tmp_path, "--data.max_samples", "16")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout_mismatch"] < 0.005 and row["grad_norm"] > 0 for row in rows)  # bf16


ASYNC = "--loss grpo --train.async_enable --actor.adam.lr 1e-2 --actor.adam.eps 1e-2".split()


def test_asynchronous_training_on_ray_resumes_bit_by_bit_and_is_that_of_one_process(flags, training_flags, tmp_path):
    ray, resumed, embedded, saved = (tmp_path / name for name in ("ray", "resumed", "embedded", "rollouts"))
    more = ["--data.max_samples", "24", "--ckpt.save_steps", "1", "--apo.save_rollouts", str(saved)]
    rows = succeed([*flags, *ASYNC], ray, *more)
    assert [row["staleness"] for row in rows] == [0, 2, 2]
    # The engine sampled with the weights that are kept for it, and which the policy has left.
    assert all(row["rollout_mismatch"] < 1e-4 for row in rows) and min(row["staleness_kl"] for row in rows[1:]) > 1e-6
    loaded = ["--apo.load_rollouts", str(saved), "--train.micro_batch_size", "32"]
    one = succeed([*training_flags, *ASYNC], embedded, *loaded, runtime="embedded")
    assert weight_error(ray, embedded) <= 1e-5
    for key in ("grad_norm", "staleness_kl"):
        assert [row[key] for row in one] == pytest.approx([row[key] for row in rows], rel=1e-3, abs=1e-8)
    shutil.copytree(ray, resumed)
    for rollout in (2, 3):
        shutil.rmtree(resumed / "ckpt" / "_actor" / f"global_step{rollout}")
    assert without_clock(succeed([*flags, *ASYNC], resumed, *more, "--ckpt.load_enable")) == without_clock(rows)
    assert weight_error(ray, resumed) == 0


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


def test_ray_job_submit(flags, sums, tiny_model, tmp_path):
    """As the README has it, with paths relative to the checkout; its own model would take a minute to make."""
    root = Path(__file__).parents[1]
    script, out, config = "examples/scripts/ray_job_submit.sh", "runs/test_job", tmp_path / "job.yaml"
    shutil.rmtree(root / out, ignore_errors=True)
    sizes = "rollout: {batch_size: 8, max_new_tokens: 12}\ndata.max_len: 48\n"
    config.write_text(f"{sizes}data.prompt_dataset: {os.path.relpath(sums, root)}\n")
    mine = ["--actor.model_name_or_path", os.path.relpath(tiny_model, root), "--data.max_samples", "8"]
    mine += ["--train.batch_size", "32", "--reward.remote_url", flags[flags.index("--reward.remote_url") + 1]]
    result = subprocess.run(
        [
            "bash",
            script,
            "--config",
            os.path.relpath(config, root),
            "--ckpt.output_dir",
            out,
            "--runtime",
            "ray",
            *mine,
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=root,
        env=os.environ | {"NUM_GPUS": "2"},
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert [row["step"] for row in read_metrics(root / out / "metrics.jsonl")] == [1]
    json.loads((root / out / "config.json").read_text())
    shutil.rmtree(root / out)
