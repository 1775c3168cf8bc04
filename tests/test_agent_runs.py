"""Runs with an agent: resumed, filtered, from saved rollouts, evaluated; and what does not go with one."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from outcome import outcome
from real_runs import without_clock
from safetensors.torch import load_file

from openrlhf_apo.cli import evaluate
from openrlhf_apo.data.calculator import calculator
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.rewards.agent_file import load_agent
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import RolloutFiles

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def agent_flags(training_flags, sums, agent_file) -> list[str]:
    return [
        *training_flags,
        *("--data.prompt_dataset", sums, "--data.max_samples", "24", "--data.max_len", "48"),
        *("--rollout.n_samples_per_prompt", "4", "--train.batch_size", "16", "--train.agent_func_path", agent_file),
    ]


@pytest.mark.parametrize("loss", ["apo", "gtpo"])
def test_a_run_resumed_is_the_uninterrupted_one_and_its_rollouts_train_alike(agent_flags, sums, tmp_path, loss):
    saved = tmp_path / "rollouts"
    evaluated = ["--eval.dataset", sums, "--eval.steps", "3", "--eval.n_samples_per_prompt", "1"]
    flags = [*agent_flags, "--loss", loss, "--ckpt.save_steps", "1", "--ckpt.max_num", "9", *evaluated]
    straight = tmp_path / "straight"
    assert outcome(flags, straight, "--apo.save_rollouts", str(saved)) == (0, "")
    rows = read_metrics(straight / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and "eval/score_mean" in rows[-1]
    for row in rows:
        assert row["rollout_mismatch"] < 1e-5 and row["feedback_length"] > 1 and row["score_mean"] > 0
    samples = RolloutFiles(str(saved)).read(1)
    assert rows[0]["response_length"] == pytest.approx(sum(sample.length for sample in samples) / len(samples))
    assert any(sample.own and False in sample.own for sample in samples)
    shown = json.loads((straight / "samples.jsonl").read_text().splitlines()[0])
    assert any("⟦" in response for response in shown["responses"])

    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed)
    for folder in (resumed / "ckpt" / "_actor").iterdir():
        if folder.is_dir() and folder.name.rpartition("step")[2] != "1":
            shutil.rmtree(folder)
    assert outcome(flags, resumed, "--ckpt.load_enable") == (0, "")
    assert without_clock(read_metrics(resumed / "metrics.jsonl")) == without_clock(rows)
    weights = load_file(straight / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in load_file(resumed / "model.safetensors").items())

    loaded = tmp_path / "loaded"
    training = agent_flags[: agent_flags.index("--data.prompt_dataset")] + ["--train.batch_size", "16"]
    training += ["--rollout.n_samples_per_prompt", "4", "--loss", loss, "--apo.load_rollouts", str(saved)]
    assert outcome(training, loaded) == (0, "")
    assert all(torch.equal(value, weights[name]) for name, value in load_file(loaded / "model.safetensors").items())


def test_dynamic_filtering_replaces_groups_of_conversations(agent_flags, tmp_path):
    assert outcome(agent_flags, tmp_path, "--loss", "dapo", "--rollout.max_new_tokens", "12") == (0, "")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all("filtered_groups" in row for row in rows)
    assert "the agent `" in (tmp_path / "README.md").read_text()


def test_another_agent_is_another_run(agent_flags, tmp_path):
    assert outcome(agent_flags, tmp_path, "--ckpt.save_steps", "1") == (0, "")
    path = Path(agent_flags[-1])
    other = path.with_name("other.py")
    other.write_text(path.read_text().replace("/ 16", "/ 8"))
    code, error = outcome([*agent_flags, "--train.agent_func_path", str(other)], tmp_path, "--ckpt.load_enable")
    assert code == 2 and "--reward has another content now" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--reward math_verify", "--reward has no effect with --train.agent_func_path"),
        ("--reward.remote_url http://localhost:1", "--reward.remote_url has no effect with --train.agent_func_path"),
        ("--reward.isolate", "--reward.isolate has no effect with --train.agent_func_path"),
        ("--reward.model_name_or_path m", "has no effect with --train.agent_func_path"),
        ("--guidance.enable --loss g2rpo_a", "--guidance.enable has no effect with --train.agent_func_path"),
        ("--train.agent_func_path nowhere.py", "no such Python file"),
        ("--train.agent_func_path setup.cfg", "no such Python file"),
    ],
)
def test_what_does_not_go_with_an_agent_is_refused(agent_flags, flags, message):
    with pytest.raises(OptionError, match=message):
        resolve([*agent_flags, *flags.split()])


def test_saved_rollouts_need_no_agent(training_flags, agent_file, tmp_path):
    (tmp_path / "rollout_00001.jsonl").touch()
    with pytest.raises(OptionError, match="--train.agent_func_path has no effect with --apo.load_rollouts"):
        resolve([*training_flags, "--apo.load_rollouts", str(tmp_path), "--train.agent_func_path", agent_file])


@pytest.mark.parametrize(
    "content, message",
    [
        ("import nothing_of_that_name", "cannot be loaded: ModuleNotFoundError"),
        ("x = 1", "it has no class AgentExecutor of OpenRLHF's AgentExecutorBase"),
        ("class AgentExecutor:\n    pass", "it has no class AgentExecutor of OpenRLHF's AgentExecutorBase"),
        ("exit()", "cannot be loaded: SystemExit"),
    ],
)
def test_a_file_without_an_agent_is_refused_before_anything_starts(agent_flags, tmp_path, content, message):
    path = tmp_path / "bad.py"
    path.write_text(content)
    code, error = outcome([*agent_flags, "--train.agent_func_path", str(path)], tmp_path / "out")
    assert code == 2 and message in error


def test_the_plan_has_the_agent_alone(agent_flags, agent_file):
    (part,) = run_plan(resolve(agent_flags)).reward.parts
    assert (part.name, part.agent, part.timeout, part.is_file, part.is_math_verify) == (
        *("agent", agent_file, 180.0),
        *(False, False),
    )


def test_a_model_is_evaluated_with_its_agent(tiny_model, sums, agent_file, tmp_path):
    flags = ["--limit", "4", "--samples", "2", "--train.agent_func_path", agent_file, "--data.max_len", "48"]
    assert evaluate.main([tiny_model, sums, *flags, "--json", str(tmp_path / "scores.json")]) == 0
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert [row["name"] for row in found] == ["greedy", "best of 1", "best of 2"]
    assert found[2]["mean"] >= found[1]["mean"] > 0


def test_the_calculator_says_what_the_warm_up_has_taught():
    agent = load_agent(str(Path(__file__).parents[1] / "examples" / "agents" / "calculator.py"))
    task = calculator(3)
    asked = [row for row in task.warm if "<|im_end|>" in row["prompt"]]
    assert len(asked) == 8192 and len(task.train) == 4096 and len(task.held_out) == 512
    assert {row["prompt"] for row in task.held_out}.isdisjoint(row["prompt"] for row in task.warm)
    for row in asked[:200]:
        instance = agent.agent_instance_cls()
        question, call, said = row["prompt"].split("<|im_end|>")
        label = {"label": row["label"], "observation_text": question}
        first = asyncio.run(instance.step(label | {"action_text": call.removeprefix("<|assistant|>")}))
        assert (first["environment_feedback"], first["done"]) == (f"{said}<|im_end|><|assistant|>", False)
        second = asyncio.run(instance.step(label | {"action_text": row["completion"]}))
        assert (second["rewards"].item(), second["done"], second["extra_logs"]["calls"].item()) == (1.0, True, 1)
    for guess in ("calc(1+)", "calc(1/2)", "\\boxed{}", ""):
        step = asyncio.run(agent.agent_instance_cls().step({"label": "1", "action_text": guess}))
        assert step["done"] and step["rewards"].item() == 0.0
