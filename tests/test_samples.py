"""The answers that every run keeps, and the command that prints them."""

import json
import os
import subprocess
import sys

import pytest

from openrlhf_apo.cli.console import READER_LEFT
from openrlhf_apo.cli.samples import main
from openrlhf_apo.trainer import sample_file
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.sample_file import SampleFile
from openrlhf_apo.trainer.samples import Sample


def group(text: str = "an answer", label: object = "2", group_id: int = 0) -> list[Sample]:
    return [
        Sample(group_id, "1+1=", label, "", [1], [2], f"{text} {i}", [-1.0], truncated=i == 1, reward=float(i))
        for i in range(2)
    ]


def write(directory, rollouts, resume_step=None, **fields) -> list[dict]:
    file = SampleFile(str(directory), resume_step)
    for rollout in rollouts:
        file.write(rollout, group(**fields), [-0.5, 0.5])
    return read_metrics(directory / "samples.jsonl")


def test_the_first_group_of_every_tenth_rollout_is_kept(tmp_path):
    first, *_, last = rows = write(tmp_path, range(1, 32), label={"answer": None})
    assert [row["step"] for row in rows] == [1, 11, 21, 31]
    assert first == last | {"step": 1} and first["responses"] == ["an answer 0", "an answer 1"]
    assert (first["rewards"], first["truncated"], first["advantages"]) == ([0.0, 1.0], [0, 1], [-0.5, 0.5])
    assert json.loads(first["label"]) == {"answer": None}


def test_a_resumed_run_goes_on_and_a_new_one_starts_anew(tmp_path, caplog):
    write(tmp_path, range(1, 30))
    assert [row["step"] for row in write(tmp_path, range(16, 32), resume_step=15)] == [1, 11, 21, 31]
    assert caplog.text == ""
    assert [row["step"] for row in write(tmp_path, range(1, 5))] == [1]
    assert len(read_metrics(tmp_path / "samples.jsonl.1")) == 4


def test_long_texts_lose_their_middle_and_the_file_has_an_end(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(sample_file, "MAX_BYTES", 20_000)
    rows = write(tmp_path, range(1, 200), text="begin" + "x" * 10_000)
    assert [row["step"] for row in rows] == [1, 11, 21] and "no more samples are kept" in caplog.text
    text = rows[0]["responses"][1]
    assert text.startswith("begin") and text.endswith("xx 1") and "\n[... 6,007 characters ...]\n" in text


@pytest.fixture
def printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def run(*more: str) -> tuple[int, str, str]:
        return main([str(tmp_path), *more]), *capsys.readouterr()

    return run


def test_groups_are_printed_wrapped_and_without_what_a_terminal_obeys(tmp_path, printed):
    write(tmp_path, [1, 11], text="\x1b[31mred\n" + "word " * 40)
    code, out, _ = printed("--step", "11")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    assert out.startswith("rollout 11 ====") and "\n1+1=\nlabel: 2\n" in out
    assert "--- answer 1: reward 0, advantage -0.500 " in out and "\\x1b[31mred\nword word" in out
    assert out.replace("\n", " ").count("rollout") == 1 and printed()[1].count("rollout") == 2


def test_saved_rollouts_have_all_groups(tmp_path, printed):
    saved = tmp_path / "elsewhere"
    RolloutFiles(str(saved)).write(2, group() + group(text="another", group_id=1))
    write(tmp_path, [1])
    (tmp_path / "run.json").write_text(json.dumps({"settings": {"apo.save_rollouts": str(saved)}}))
    assert "another 1" in printed("--step", "2")[1] and "another" not in printed("--step", "1")[1]
    assert main([str(saved)]) == 0


def test_a_reader_that_leaves_ends_the_command_without_a_word(tmp_path):
    write(tmp_path, [1])
    command = [sys.executable, "-m", "openrlhf_apo.cli.samples", str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (READER_LEFT, "")


def test_what_is_not_there_is_one_line(tmp_path, printed):
    assert printed() == (
        2,
        "",
        f"error: {tmp_path} has neither samples.jsonl nor saved rollouts: give the output directory of a run\n",
    )
    write(tmp_path, [1, 11])
    assert "has no group of rollout 2, but of 1, 11" in printed("--step", "2")[2]
