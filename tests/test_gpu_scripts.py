"""The parts of the CUDA path that are scripts and programs of their own, with CUDA, toolkit, Ray and pip faked."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_apo.options import resolve
from openrlhf_apo.trainer.metrics import MetricsFile

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")

# Writes "PATH|arguments" of each call; the toolkit check alone is real, on a fake torch.
PYTHON = """#!/usr/bin/env bash
printf '%s|%s\\n' "$PATH" "${0##*/} $*" >> "$CALLS"
case "$*" in
    *cuda_toolkit.py) PYTHONPATH="$FAKE_TORCH" exec "$REAL_PYTHON" "$@" ;;
    *"import flash_attn"*) exit "${NO_FLASH_ATTN:-0}" ;;
    "start "*) exec sleep 60 ;;
    *urlopen*) grep -q "ray start" "$CALLS" ;;
esac
"""
# A full installation's first line of `nvcc -V` is not the one with the version.
NVCC = "#!/bin/sh\necho 'nvcc: NVIDIA (R) Cuda compiler driver'\necho 'Cuda compilation tools, release {0}, V{0}.88'\n"


class Tree:
    """A copy of the scripts and what they read, in which programs only write down how they were called."""

    def __init__(self, path: Path):
        self.path = path / "tree"
        for name in ("scripts", "requirements", "examples/scripts"):
            shutil.copytree(ROOT / name, self.path / name)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.path)
        self.bin = self.path / ".venv" / "bin"
        self.bin.mkdir(parents=True)
        for name in ("python", "ray"):
            self.program(self.bin / name, PYTHON)
        (self.path / "torch" / "utils").mkdir(parents=True)
        (self.path / "torch" / "__init__.py").write_text("class version:\n    cuda = '13.0'\n")
        (self.path / "torch" / "utils" / "cpp_extension.py").write_text(
            "import os\nCUDA_HOME = os.environ.get('CUDA_HOME')\n"
        )
        self.calls_file = self.path / "calls.txt"

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def toolkit(self, version: str, headers: bool = True) -> str:
        home = self.path / f"cuda-{version}"
        self.program(home / "bin" / "nvcc", NVCC.format(version))
        if headers:
            (home / "include").mkdir()
            (home / "include" / "cuda_runtime.h").touch()
        return str(home)

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        self.calls_file.write_text("")
        environment = {
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(self.bin / "python"),
            "CALLS": str(self.calls_file),
            "FAKE_TORCH": str(self.path),
            "REAL_PYTHON": sys.executable,
        } | environment
        command = ["bash", str(self.path / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    def calls(self, containing: str = "") -> list[str]:
        lines = [line.split("|", 1)[1] for line in self.calls_file.read_text().splitlines()]
        return [line for line in lines if containing in line]

    def paths(self) -> list[str]:
        """The first entry of PATH in each call."""
        return [line.split(":", 1)[0] for line in self.calls_file.read_text().splitlines()]


@pytest.fixture
def tree(tmp_path) -> Tree:
    return Tree(tmp_path)


def load(name: str):
    """benchmarks/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


# --- ninja


def test_the_scripts_put_the_environment_on_path(tree):
    assert tree.run("examples/scripts/train_apo_qwen3.sh", NUM_GPUS="1").returncode == 0
    train = [path for path, call in zip(tree.paths(), tree.calls(), strict=True) if "train_apo_ray" in call]
    assert train == [str(tree.bin)]

    tree.program(tree.path / "scripts" / "install.sh", "#!/usr/bin/env bash\n")
    assert tree.run("examples/scripts/train_apo_tiny_cpu.sh").returncode == 0
    assert set(tree.paths()) == {str(tree.bin)} and tree.calls("train_apo_ray")

    assert tree.run("examples/scripts/ray_job_submit.sh", "--dry_run", NUM_GPUS="1").returncode == 0
    assert set(tree.paths()) == {str(tree.bin)} and tree.calls("start --head") and tree.calls("job submit")


def test_ninja_is_installed_with_cuda():
    assert re.search(r"^ninja==", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE)


# --- bash scripts/install.sh gpu


def refusal(result: subprocess.CompletedProcess) -> str:
    """The line a script stops with; before it, install.sh only says what it is doing."""
    assert result.returncode == 2
    *before, line = result.stderr.splitlines()
    assert all(line.startswith("install.sh: ") for line in before)
    return line


@pytest.mark.parametrize(
    "version, headers, complaint",
    [
        (None, True, "no CUDA toolkit found, and torch is built for CUDA 13.0"),
        ("12.8", True, "nvcc is of CUDA 12.8, and torch is built for CUDA 13.0"),
        ("13.0", False, "has nvcc but not include/cuda_runtime.h"),
    ],
)
def test_flash_attn_is_not_compiled_without_its_toolkit(tree, version, headers, complaint):
    home = {"CUDA_HOME": tree.toolkit(version, headers)} if version else {}
    line = refusal(tree.run("scripts/install.sh", "gpu", **home))
    assert complaint in line and "FLASH_ATTN=0" in line and "ATTENTION=sdpa" in line
    assert tree.calls("flash-attn") == [] and not list(tree.bin.parent.glob(".installed*"))


def test_a_toolkit_that_does_not_run_is_refused(tree):
    assert "does not run" in refusal(tree.run("scripts/install.sh", "gpu", CUDA_HOME=str(tree.path)))


def test_flash_attn_is_compiled_last_and_in_sight(tree):
    result = tree.run("scripts/install.sh", "gpu", CUDA_HOME=tree.toolkit("13.1"))
    assert result.returncode == 0, result.stderr
    assert "about an hour (FLASH_ATTN=0 leaves it out)" in result.stderr
    *before, flash_attn, project = tree.calls("pip install")
    assert "--no-build-isolation flash-attn==" in flash_attn and "--quiet" not in flash_attn
    assert "--editable" in project
    (deepspeed,) = [call for call in before if "deepspeed==" in call]
    assert "--no-build-isolation" not in deepspeed  # its setup.py asks a torch with CUDA for nvcc
    (openrlhf,) = [call for call in before if "openrlhf==" in call]
    assert "--no-deps" in openrlhf  # its metadata demands flash-attn
    assert [path for path, call in zip(tree.paths(), tree.calls(), strict=True) if call == flash_attn] == [
        str(tree.bin)
    ]


def test_flash_attn_can_be_left_out_and_added_later(tree):
    assert tree.run("scripts/install.sh", "gpu", FLASH_ATTN="0").returncode == 0
    assert tree.calls("openrlhf==") and not tree.calls("flash-attn") and not tree.calls("cuda_toolkit")
    result = tree.run("scripts/install.sh", "gpu", FLASH_ATTN="0")
    assert result.returncode == 0 and "up to date" in result.stderr and tree.calls() == []
    result = tree.run("scripts/install.sh", "gpu", CUDA_HOME=tree.toolkit("13.0"))
    assert result.returncode == 0 and tree.calls("flash-attn==")


def test_the_choice_is_0_or_1(tree):
    assert "FLASH_ATTN=no" in refusal(tree.run("scripts/install.sh", "gpu", FLASH_ATTN="no"))


def test_openrlhf_has_what_it_needs_beside_flash_attn():
    """Its requirements that the GPU installation leaves out are those that nothing imports."""
    files = "".join((ROOT / "requirements" / name).read_text() for name in ("gpu.txt", "cpu.lock"))
    listed = {name.replace("_", "-") for name in re.findall(r"^([\w-]+)", files, re.MULTILINE)}
    wanted = {
        re.match(r"[\w-]+", line).group()
        for line in importlib.metadata.requires("openrlhf")
        if "extra ==" not in line and not line.startswith("flash-attn")
    }
    unused = {"isort", "optimum", "pynvml", "transformers-stream-generator"}
    assert wanted - listed - {"torch", "wheel", "deepspeed"} == unused
    root = Path(importlib.util.find_spec("openrlhf").origin).parent
    source = "".join(path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    assert [name for name in unused if re.search(rf"^\s*(import|from) {name.replace('-', '_')}\b", source, re.M)] == []


# --- examples/scripts/train_apo_qwen3.sh


def trainer_flags(tree: Tree) -> list[str]:
    (call,) = tree.calls("train_apo_ray")
    return call.split("openrlhf_apo.cli.train_apo_ray ")[1].split()


@pytest.mark.parametrize("tp, engines", [("1", 8), ("2", 4), ("8", 1)])
@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_the_recipe_passes_every_check(tree, monkeypatch, tp, engines, attention):
    result = tree.run("examples/scripts/train_apo_qwen3.sh", NUM_GPUS="8", TP=tp, ATTENTION=attention)
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    args = resolve(trainer_flags(tree), False)  # the model need not be there
    assert (args.actor.num_gpus_per_node, args.vllm.num_engines, args.vllm.tensor_parallel_size) == (
        8,
        engines,
        int(tp),
    )
    assert args.train.colocate_all and args.vllm.enable_sleep
    if attention == "flash":
        assert args.ds.packing_samples and args.ds.attn_implementation == "flash_attention_2"
    else:
        assert not args.ds.packing_samples and args.ds.attn_implementation == "sdpa"


def test_what_is_given_on_the_command_line_wins(tree):
    tree.run("examples/scripts/train_apo_qwen3.sh", "--train.micro_batch_size", "2", NUM_GPUS="1", ATTENTION="sdpa")
    assert trainer_flags(tree)[-2:] == ["--train.micro_batch_size", "2"]


@pytest.mark.parametrize(
    "environment, complaint",
    [
        ({"NUM_GPUS": "6", "TP": "4"}, "TP=4 does not divide NUM_GPUS=6"),
        ({"NUM_GPUS": "2", "TP": "4"}, "TP=4 does not divide NUM_GPUS=2"),
        ({"NUM_GPUS": "4", "TP": "0"}, "TP=0 does not divide NUM_GPUS=4"),
        ({"NUM_GPUS": "4", "TP": "two"}, "TP=two does not divide NUM_GPUS=4"),
        ({"ATTENTION": "eager"}, "ATTENTION=eager: flash or sdpa"),
        ({"NO_FLASH_ATTN": "1"}, "FLASH_ATTN=1 bash scripts/install.sh gpu compiles it, or ATTENTION=sdpa"),
        ({"PYTHON": ".venv/bin/none"}, "bash scripts/install.sh gpu makes it"),
    ],
)
def test_the_recipe_refuses_in_one_line(tree, environment, complaint):
    result = tree.run("examples/scripts/train_apo_qwen3.sh", **({"NUM_GPUS": "1"} | environment))
    assert result.returncode == 2 and complaint in result.stderr and len(result.stderr.splitlines()) == 1
    assert not tree.calls("openrlhf_apo")


def test_sdpa_does_not_ask_for_flash_attn(tree):
    result = tree.run("examples/scripts/train_apo_qwen3.sh", NUM_GPUS="1", ATTENTION="sdpa", NO_FLASH_ATTN="1")
    assert result.returncode == 0, result.stderr


# --- benchmarks/bf16_accumulation.py


def test_what_docs_say_of_accumulation_in_bf16(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import bf16_accumulation as benchmark\n"
        "benchmark.CONFIGURATIONS = [(2, None), (2, 'fp32'), (3, 'fp32')]; benchmark.MICRO_BATCHES = (1, 8)\n"
        f"sys.argv = ['x', '--json', {str(tmp_path / 'rows.json')!r}]; benchmark.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    error = {}
    for row in json.loads((tmp_path / "rows.json").read_text()):
        error[row["zero_stage"], row["grad_accum_dtype"], row["micro_batches"]] = row["accumulation_error"]
        assert 0.005 < row["error"] < 0.02
    assert error[2, None, 1] == error[2, "fp32", 1] == error[3, "fp32", 1] == 0
    assert 0.002 < error[2, None, 8] < 0.006
    assert error[2, "fp32", 8] == error[2, None, 8]  # no effect
    assert error[3, "fp32", 8] < 1e-6
    assert "| 2 | fp32 | 0.00% / " in result.stdout


# --- benchmarks/gpu_smoke.py


def test_the_smoke_test_stops_without_cuda():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_smoke.py")]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and "--cpu" in result.stderr
    assert subprocess.run([*command, "--help"], capture_output=True).returncode == 0


def test_what_the_smoke_test_skips():
    smoke = load("gpu_smoke")

    def skipped(*machine) -> dict:
        return {case.name: case.skipped for case in smoke.run_cases(*machine) if case.skipped}

    assert skipped(2, True, False) == {}
    second = {name: "needs 2 GPUs" for name in ("colocated on 2 GPUs, ZeRO 3", "policy and engine apart, ZeRO 2")}
    packed = {f"colocated, ZeRO {stage}, packed": "flash-attn cannot be imported" for stage in (2, 3)}
    assert skipped(1, True, False) == second
    assert skipped(1, False, False) == second | packed
    assert skipped(0, False, True) == packed


def test_the_smoke_tests_flags_pass_every_check(monkeypatch):
    smoke = load("gpu_smoke")
    monkeypatch.chdir(ROOT)
    given = ["--config", "configs/tiny_cpu.yaml", "--actor.num_gpus_per_node", "1", "--vllm.num_engines", "1"]
    packed = next(case for case in smoke.run_cases(2, True, False) if "packed" in case.name)
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve([*given, *packed.flags], False)  # the model need not be there
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    for case in smoke.run_cases(2, True, False):
        args = resolve([*given, *case.flags], False)  # the model need not be there
        assert args.train.colocate_all == args.vllm.enable_sleep == ("colocated" in case.name)
        assert args.ds.packing_samples == ("packed" in case.name) and f"ZeRO {args.ds.zero_stage}" in case.name
        assert args.ds.param_dtype == "bf16"


@pytest.mark.parametrize(
    "code, mismatches, outcome, note",
    [
        (0, [0.003, 0.004], "passed", ""),
        (0, [0.003, 0.04], "failed", "mismatch above 0.01 nats"),
        (0, [0.003], "failed", "1 of 2 steps"),
        (1, [], "failed", "exit code 1; see runs/gpu_smoke/a_b/log.txt; error: weights differ"),
        (None, [], "failed", "not done after"),
    ],
)
def test_the_smoke_test_judges_a_run(tmp_path, monkeypatch, code, mismatches, outcome, note):
    smoke = load("gpu_smoke")
    monkeypatch.setattr(smoke, "ROOT", tmp_path)

    def run(command, cwd, stdout, stderr, timeout):
        assert "--apo.check_weights" in command and command[-1] == "--flag"
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout)
        metrics = MetricsFile(cwd / "runs" / "gpu_smoke" / "a_b" / "metrics.jsonl")
        metrics.write({"step": 0})
        for step, mismatch in enumerate(mismatches, start=1):
            metrics.write({"step": step, "rollout_mismatch": mismatch})
        stdout.write("Traceback\nerror: weights differ\nend\n")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(smoke.subprocess, "run", run)
    result = smoke.train(smoke.Case("a, b", ["--flag"]), 2, "bf16")
    assert result.outcome == outcome and note in result.note


def test_the_smoke_test_sees_passes_that_differ(monkeypatch):
    smoke = load("gpu_smoke")
    results = {result.name: result for result in smoke.compare_passes(False, True, "bf16")}
    outcomes = {name: result.outcome for name, result in results.items()}
    assert outcomes == {
        "passes: sdpa": "passed",
        "passes: sdpa, gradient checkpointing": "passed",
        "passes: flash_attention_2, packed": "skipped",
        "passes: flash_attention_2, packed, gradient checkpointing": "skipped",
    }
    from openrlhf.models import Actor

    forward = Actor.forward

    def noisy(actor, *inputs):
        return forward(actor, *inputs) + 1e-3 * actor.training

    monkeypatch.setattr(Actor, "forward", noisy)
    first, *_ = smoke.compare_passes(False, True, "bf16")
    assert first.outcome == "failed" and "training pass moves u by up to 7.9e-02" in first.note
