"""`compare` from its file to its results: what is refused before it starts, what a kill leaves, who crashed."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from real_runs import DIGITS_REWARD

from openrlhf_apo.analysis import compare as compare_module
from openrlhf_apo.analysis.compare_file import check_arms, load_comparison
from openrlhf_apo.analysis.compare_runs import Run, run_all
from openrlhf_apo.cli.compare import main
from openrlhf_apo.data.files import write_jsonl
from openrlhf_apo.data.pairs import pairs
from openrlhf_apo.trainer.metrics import read_metrics

ROOT = Path(__file__).parents[1]
STEPS = 6
# Stands in for the trainer: a line of metrics and a checkpoint per step; CRASH=arm_S fails at step 3, PAUSE=N stops
# going on at step N, MEET=N waits until N runs have started. Every call is a line of calls.txt.
TRAINER = f"""
import json, os, sys, time
from pathlib import Path
argv = sys.argv[1:]
out = Path(argv[argv.index("--ckpt.output_dir") + 1])
latest = Path(argv[argv.index("--ckpt.path") + 1], "_actor", "latest")
name = f"{{out.parent.name}}_{{out.name[5:]}}"
resume = "--ckpt.load_enable" in argv
with open(out.parents[1] / "calls.txt", "a") as calls:
    calls.write(name + (" resumed" if resume else "") + "\\n")
deadline = time.time() + 60
while len((out.parents[1] / "calls.txt").read_text().split("\\n")) <= int(os.environ.get("MEET", 0)):
    assert time.time() < deadline, "nobody else came"
    time.sleep(0.02)
done = int(latest.read_text()) if resume else 0
for step in range(done + 1, {STEPS} + 1):
    if name == os.environ.get("CRASH") and step == 3:
        print("noise", "error: out of luck", "more noise", sep="\\n", file=sys.stderr)
        sys.exit(1)
    while str(step) == os.environ.get("PAUSE"):
        time.sleep(0.02)
    row = {{"step": step, "reward_mean": 0.1 * step + 0.01 * int(name[-1]), "time/step": 2.0}}
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\\n")
    (latest.parent / "1").mkdir(parents=True, exist_ok=True)
    marker = {{"rollout": step, "time": 0.0, "metric": None, "manifest": {{}}, "sizes": {{}}}}
    (latest.parent / "1" / "complete.json").write_text(json.dumps(marker))
    latest.write_text(str(step))
"""


@pytest.fixture(autouse=True)
def metrics_logger_as_it_was():
    """compare silences the reader of metrics.jsonl; other tests of this process listen to it."""
    logger = logging.getLogger("openrlhf_apo.trainer.metrics")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def spec(tiny_model, sums, tmp_path) -> dict:
    """The content of a comparison file: two arms, two seeds."""
    return {
        "output_dir": str(tmp_path / "out"),
        "seeds": [1, 2],
        "flags": {
            "reward": "math_verify",
            "actor.model_name_or_path": tiny_model,
            "data": {"prompt_dataset": sums, "max_len": 48},
            "rollout": {"batch_size": 8, "max_new_tokens": 12},
            "train": {"batch_size": 32, "micro_batch_size": 8},
        },
        "arms": {"apo": {"loss": "apo", "apo.beta_r": 0.9}, "grpo": {"loss": "grpo"}},
        "threshold": 0.3,
    }


@pytest.fixture
def trainer(tmp_path, monkeypatch) -> list[str]:
    """compare runs the stand-in."""
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    command = [sys.executable, str(path)]
    monkeypatch.setattr(compare_module, "run_all", partial(run_all, trainer=command))
    monkeypatch.setattr("openrlhf_apo.analysis.compare_runs.POLL_SECONDS", 0.02)
    return command


def write(tmp_path, spec) -> str:
    path = tmp_path / "compare.yaml"
    path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(spec, sort_keys=False))
    return str(path)


def refused(path, capfd, *more) -> str:
    assert main([path, *more]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "warning" not in line]
    assert line.startswith("error: ")
    return line


def calls(tmp_path) -> list[str]:
    return sorted((tmp_path / "out" / "calls.txt").read_text().splitlines())


def csv_rows(out) -> list[dict]:
    with open(out / "results.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- what is refused, before anything starts


def test_a_typo_in_the_last_arm_is_refused_before_the_first_starts(spec, trainer, tmp_path, capfd):
    spec["prepare"] = [f"touch {tmp_path}/prepared"]
    for flags, complaint in (
        ({"loss": "apo", "apo.gama": 0.4}, "--apo.gama"),
        (
            {"loss": "apo", "alpha_mode": "fixed", "apo.gamma": 0.4},
            "--apo.gamma has no effect with --alpha_mode fixed",
        ),
        ({"loss": "opo"}, "--loss"),
    ):
        spec["arms"]["third"] = flags
        line = refused(write(tmp_path, spec), capfd)
        assert "arm third: " in line and complaint in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.yaml", "trainer.py"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"seeds": []}, "seeds must be a list"),
        ({"seeds": [1, 1]}, "comes twice"),
        ({"seeds": "1, 2"}, "seeds must be a list"),
        ({"arms": {}}, "arms is missing"),
        ({"arms": {"a/b": {}}}, "arm 'a/b'"),
        ({"arms": {"a": "apo"}}, "arm a: expected"),
        ({"arms": {"a": {"train.seed": 1}}}, "arm a: train.seed is set by compare itself"),
        ({"arms": {"a": {"ckpt": {"path": "x"}}}}, "arm a: ckpt.path is set by compare itself"),
        ({"threshold": "high"}, "threshold 'high'"),
        ({"baseline": "ppo"}, "baseline 'ppo': no such arm"),
        ({"jobs": 0}, "jobs 0"),
        ({"prepare": "touch x"}, "prepare must be a list"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"config": 3}, "config must be a file of the trainer, or a list"),
        ({"output_dir": None}, "output_dir is missing"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(spec, change, complaint, tmp_path, capfd):
    assert complaint in refused(write(tmp_path, spec | change), capfd)
    assert not (tmp_path / "out").exists()


def test_an_arm_that_comes_twice_is_refused(tmp_path, capfd):
    text = f"output_dir: {tmp_path}/out\nseeds: [1]\narms:\n  a: {{loss: apo}}\n  a: {{loss: grpo}}\n"
    assert "'a' comes twice (line 4" in refused(write(tmp_path, text), capfd)


def test_files_that_are_no_yaml_mapping_are_refused(tmp_path, capfd):
    assert "key: value" in refused(write(tmp_path, "- a\n"), capfd)
    assert "compare.yaml" in refused(write(tmp_path, "a: [\n"), capfd)
    assert "nowhere.yaml" in refused("nowhere.yaml", capfd)


def test_arms_override_flags_and_flags_override_the_base(spec, tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("apo: {gamma: 0.1, beta_r: 2, rho: 0.2}\ntrain.seed: 9\nds.packing_samples: true\n")
    spec |= {"config": str(base), "flags": {"apo.beta_r": 3, "ds": {"packing_samples": False}, "ckpt.save_hf": True}}
    spec["arms"] = {"a": {"apo.gamma": 0.4, "apo.weight_clip": [0.1, 2], "apo.rho": None}}
    words = load_comparison(write(tmp_path, spec)).arms["a"]
    assert (
        " ".join(words)
        == "--apo.gamma 0.4 --apo.beta_r 3 --ds.packing_samples false --ckpt.save_hf --apo.weight_clip 0.1 2"
    )


def test_gpu_runs_side_by_side_need_one_ray(spec, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(compare_module, "has_cuda", lambda: True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "RAY_ADDRESS" in refused(write(tmp_path, spec), capfd, "--jobs", "2")


def test_a_failing_preparation_starts_nothing(spec, trainer, tmp_path, capfd):
    spec["prepare"] = ["python -c 'raise SystemExit(3)'"]
    assert "prepare: exit code 3" in refused(write(tmp_path, spec), capfd)
    assert not (tmp_path / "out" / "calls.txt").exists()


def test_a_model_that_preparation_did_not_make_is_refused(spec, trainer, tmp_path, capfd):
    spec["flags"]["actor.model_name_or_path"] = str(tmp_path / "model")
    marker = tmp_path / "prepared"
    spec["prepare"] = [["python", "-c", f"open({str(marker)!r}, 'x')"]]
    assert "arm apo: --actor.model_name_or_path" in refused(write(tmp_path, spec), capfd)
    assert marker.exists() and not (tmp_path / "out" / "calls.txt").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "compare").glob("*.yaml")), ids=lambda path: path.name)
def test_the_comparisons_of_this_repository_pass_every_check(path, monkeypatch):
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.cuda.is_available", lambda: "qwen3" in path.name)
    comparison = load_comparison(path)
    assert list(comparison.arms) == ["apo_ess", "apo_fixed", "apo_guarded", "gspo", "adpo_softmax", "grpo"]
    assert check_arms(comparison, check_model=False) == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "evidence").glob("*.yaml")), ids=lambda path: path.name)
def test_the_cells_of_the_evidence_pass_every_check(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = load_comparison(path)
    assert comparison.output_dir == Path("runs/evidence", path.stem)
    assert check_arms(comparison, check_model=False) == []


# --- running


def test_runs_everything_then_skips_it(spec, trainer, tmp_path, capfd):
    path = write(tmp_path, spec | {"prepare": [f"touch {tmp_path}/prepared"]})
    assert main([path]) == 0
    out, shown = tmp_path / "out", capfd.readouterr()
    assert calls(tmp_path) == ["apo_1", "apo_2", "grpo_1", "grpo_2"]
    assert "apo seed 1: starts" in shown.err and "grpo seed 2: finished, 6 steps, reward 0.120 to 0.620" in shown.err
    assert "| apo | 2 | 0.515 ± 0.064 |" in shown.out  # means of steps 4 to 6: 0.51 and 0.52
    assert [row["steps_to_threshold"] for row in csv_rows(out)] == ["4"] * 4
    assert {"results.csv", "results.md", "figure_reward.png"} <= {path.name for path in out.iterdir()}
    assert not (out / "apo/seed_1/ckpt").exists()
    assert "--apo.beta_r 0.9" in (out / "apo/seed_1/train.log").read_text().splitlines()[0]

    (tmp_path / "prepared").unlink()
    (out / "results.md").unlink()
    assert main([path]) == 0
    assert len(calls(tmp_path)) == 4
    assert (out / "results.md").exists() and not (tmp_path / "prepared").exists()


def test_an_arm_redefined_after_it_ran_is_refused(spec, trainer, tmp_path, capfd):
    assert main([write(tmp_path, spec)]) == 0
    capfd.readouterr()
    spec["arms"]["apo"]["apo.beta_r"] = 0.5
    line = refused(write(tmp_path, spec), capfd)
    assert "arm apo, seed 1 was run with other settings (--apo.beta_r: 0.9, now 0.5): delete " in line
    assert len(calls(tmp_path)) == 4


def test_a_crashed_arm_is_named_and_tried_again(spec, trainer, tmp_path, capfd, monkeypatch):
    path = write(tmp_path, spec)
    monkeypatch.setenv("CRASH", "apo_1")
    assert main([path]) == 1
    page = (tmp_path / "out/results.md").read_text()
    assert "| apo | 1 of 2, rest crashed | 0.520 |" in page and "| grpo | 2 | 0.515 ±" in page
    assert "**apo** crashed: 1 of 2, seed 1 after 2 steps: out of luck" in page
    crashed = csv_rows(tmp_path / "out")[0]
    assert (crashed["status"], crashed["error"], crashed["final_reward"]) == ("crashed", "out of luck", "")
    assert "apo seed 1: crashed: out of luck" in capfd.readouterr().err

    monkeypatch.delenv("CRASH")
    assert main([path]) == 0
    assert calls(tmp_path) == ["apo_1", "apo_1 resumed", "apo_2", "grpo_1", "grpo_2"]
    assert "crashed:" not in (tmp_path / "out/results.md").read_text()


def test_a_run_killed_from_outside_is_a_crash(spec, tmp_path):
    run = Run(tmp_path, "a", 1, [])
    run_all([run], 1, [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert run.record["error"] == "killed by SIGKILL" and not run.finished
    run_all([run], 1, [sys.executable, "-c", "pass"])
    assert run.record["error"] == "no rollout step in metrics.jsonl" and not run.finished


def test_jobs_run_side_by_side(spec, trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("MEET", "4")
    assert main([write(tmp_path, spec), "--jobs", "4"]) == 0


@pytest.mark.parametrize("jobs, given, threads", [(1, None, "None"), (4, None, "2"), (16, None, "1"), (4, "3", "3")])
def test_runs_beside_each_other_share_eight_cores(jobs, given, threads, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    run = Run(tmp_path, "a", 1, [])
    run_all([run], jobs, [sys.executable, "-c", "import os; raise SystemExit(str(os.environ.get('OMP_NUM_THREADS')))"])
    assert run.record["error"] == threads


def wait_for(condition, seconds: float = 120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda signum: signum.name)
def test_killed_and_run_again_it_continues(spec, trainer, signum, tmp_path):
    path = write(tmp_path, spec | {"seeds": [1]})
    code = f"""
import sys
from functools import partial
from openrlhf_apo.analysis import compare
from openrlhf_apo.cli.compare import main
compare.run_all = partial(compare.run_all, trainer={trainer})
sys.exit(main([{path!r}]))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env=os.environ | {"PAUSE": "4"}, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/apo/seed_1/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") == 3)
    (child,) = psutil.Process(process.pid).children()

    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 2 and "another compare is at work" in second.stderr

    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    if signum != signal.SIGKILL:
        assert process.returncode == 130 and "stopped: the same command continues" in stderr
    assert not (tmp_path / "out/results.csv").exists()

    assert main([path]) == 0
    assert calls(tmp_path) == ["apo_1", "apo_1 resumed", "grpo_1"]
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, STEPS + 1))


# --- the real trainer


@pytest.mark.slow
def test_two_arms_through_the_real_trainer_with_a_kill_between(spec, sums, tmp_path):
    reward = tmp_path / "digits.py"
    reward.write_text(DIGITS_REWARD)
    flags = spec["flags"]
    del flags["reward"]
    flags |= {"reward.remote_url": str(reward), "ckpt.save_steps": 1}
    flags["data"]["max_samples"] = 64  # 8 rollouts
    flags["eval"] = {"dataset": sums, "ends": True, "temperature": 1.0, "n_samples_per_prompt": 2}
    path = write(tmp_path, spec | {"seeds": [1]})
    command = [sys.executable, "-m", "openrlhf_apo.cli.compare", path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    latest = tmp_path / "out/apo/seed_1/ckpt/_actor/latest"
    while not latest.exists():
        assert process.poll() is None
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    wait_for(lambda: not any(child.is_running() for child in started))

    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "apo seed 1: goes on from its checkpoint" in result.stderr and "grpo seed 1: starts" in result.stderr
    for arm in ("apo", "grpo"):
        run = tmp_path / "out" / arm / "seed_1"
        assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(9))
        assert json.loads((run / "compare.json").read_text())["exit_code"] == 0
    assert all(row["score_mean"] and not row["pass1"] for row in csv_rows(tmp_path / "out"))


def test_a_small_cell_of_the_evidence(tiny_model, tmp_path):
    """What makes docs/evidence/*.csv, from the task to the paired differences, with an untrained model."""
    task = pairs(0)
    for name, rows in {"train": task.train[:64], "eval": task.held_out[:8], "shifted": task.shifted[:8]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    cell = yaml.safe_load((ROOT / "configs" / "evidence" / "pairs_1.yaml").read_text())
    cell |= {"output_dir": str(tmp_path / "out"), "seeds": [1, 2], "prepare": []}
    cell["config"] = str(ROOT / cell["config"])
    cell["arms"] = {arm: cell["arms"][arm] for arm in ("apo_99", cell["baseline"])}
    cell["flags"] |= {
        "actor.model_name_or_path": tiny_model,
        "reward": str(ROOT / "openrlhf_apo" / "rewards" / "pairs.py"),
        "data": {"prompt_dataset": str(tmp_path / "train.jsonl"), "apply_chat_template": False, "max_samples": 64},
        "eval": {"dataset": f"{tmp_path}/eval.jsonl,{tmp_path}/shifted.jsonl", "steps": 2},
    }
    command = [sys.executable, "-m", "openrlhf_apo.cli.compare", write(tmp_path, cell)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = csv_rows(tmp_path / "out")
    assert [(row["arm"], row["seed"], row["steps"]) for row in rows] == [
        ("apo_99", "1", "2"), ("apo_99", "2", "2"), ("grpo", "1", "2"), ("grpo", "2", "2")
    ]  # fmt: skip
    assert all(float(row["final_entropy"]) > 0 for row in rows)
    assert "minus grpo" in (tmp_path / "out" / "results.md").read_text()
