"""What `cli.push` uploads, to a hub that is faked, and what it says where there is none."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

from openrlhf_apo.cli.push import main


@pytest.fixture
def run_dir(tiny_model, tmp_path):
    """A run's output directory."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    for name in ("README.md", "run.json", "metrics.jsonl", "samples.jsonl", "run.log", "report.png", "report.html"):
        (folder / name).write_text("{}")
    (folder / "ckpt" / "_actor").mkdir(parents=True)
    (folder / "ckpt" / "_actor" / "config.json").write_text("{}")
    return folder


def test_the_model_is_uploaded_and_nothing_else_of_the_run(run_dir, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append((name, settings))

        def upload_folder(self, **settings):
            calls.append(settings)
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert main([str(run_dir), "someone/tiny", "--private"]) == 0
    assert calls[0] == ("someone/tiny", {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == run_dir
    files = calls[1]["allow_patterns"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert not {"run.json", "metrics.jsonl", "samples.jsonl", "run.log", "report.png", "ckpt"} & set(files)
    assert "https://hub/commit/1" in capsys.readouterr().out
    shutil.rmtree(run_dir / "ckpt")
    from_hub = huggingface_hub.utils.filter_repo_objects(
        [path.name for path in run_dir.iterdir()], allow_patterns=files
    )
    assert sorted(from_hub) == files  # the hub's own reading of them


def test_no_hub_is_one_line(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert main([str(run_dir), "someone/tiny"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: someone/tiny is not uploaded: ")


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_a_model_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([folder, "someone/tiny"])
    assert stopped.value.code == 2 and f"{folder} holds no model" in capsys.readouterr().err
