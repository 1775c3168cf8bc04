"""Checkpoints: whatever is killed, cut, deleted or mixed up, no run goes on from a wrong one and none is lost."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from outcome import outcome
from real_runs import without_clock

from openrlhf_apo.errors import OptionError, ProcessDied, RunError
from openrlhf_apo.trainer.checkpoint_folder import MARKER, CheckpointFolder, complete_checkpoints, find_checkpoint
from openrlhf_apo.trainer.checkpoints import Checkpoints
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.stop import Stopped

pytestmark = pytest.mark.filterwarnings("ignore")


class FilePolicy:
    """PolicyHandle that saves two files, in pieces."""

    def __init__(self, folder: CheckpointFolder):
        self.folder = folder

    def save_checkpoint(self, tag: str, trainer_state: dict) -> None:
        for name in ("weights", "optimizer"):
            with open(self.folder.root / tag / name, "wb") as file:
                for _ in range(4):
                    file.write(b"x" * 1000)
        (self.folder.root / tag / "trainer.json").write_text(json.dumps(trainer_state))


def checkpoints(path: Path, max_num: int = 2, max_gb: float = 1.0) -> Checkpoints:
    folder = CheckpointFolder(str(path), max_num, max_gb, {"loss": "apo"})
    return Checkpoints(FilePolicy(folder), folder, 1, "none")


def save(path: Path, rollout: int) -> None:
    checkpoints(path).save(rollout, {"step": rollout})


def in_child_killed_at(event: int, path: Path) -> bool:
    """Save checkpoint 3 in a child that is killed at the event-th call of a function. Whether it was killed."""
    child = os.fork()
    if child == 0:
        count = 0

        def kill(*_):
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(kill)
        save(path, 3)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_save_killed_anywhere_leaves_the_checkpoint_before_or_the_new_one(tmp_path):
    events, found = 1, set()
    while True:
        path = tmp_path / str(events)
        save(path, 1)
        save(path, 2)
        killed = in_child_killed_at(events, path)
        newest = find_checkpoint(path / "_actor")
        assert newest is not None and newest.damage() is None
        assert json.loads((newest.folder / "trainer.json").read_text())["step"] == newest.rollout
        found.add(newest.rollout)
        save(path, 4)  # a run that goes on is not hindered by what the killed one left
        assert [each.rollout for each in complete_checkpoints(path / "_actor")][0] == 4
        assert {folder.name for folder in (path / "_actor").iterdir() if folder.is_dir()} <= {
            "global_step2",
            "global_step3",
            "global_step4",
        }
        shutil.rmtree(path)
        if not killed:
            break
        events = events + 1 if events < 10 else int(events * 1.2)
    assert events > 10 and found == {2, 3}  # more than ten points; before and after the marker


def test_a_cut_or_missing_file_is_named_and_the_one_before_is_offered(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "_actor" / "global_step2" / "optimizer"
    os.truncate(file, 1234)
    with pytest.raises(RunError, match=r"optimizer has 1,234 of 4,000 bytes: remove it to go on from global_step1"):
        find_checkpoint(tmp_path / "_actor")
    file.unlink()
    with pytest.raises(RunError, match="optimizer is missing"):
        find_checkpoint(tmp_path / "_actor")
    shutil.rmtree(file.parent)
    assert find_checkpoint(tmp_path / "_actor").rollout == 1
    (tmp_path / "_actor" / "global_step1" / "weights").unlink()
    with pytest.raises(RunError, match="start anew in another --ckpt.path"):
        find_checkpoint(tmp_path / "_actor")


def test_a_missing_latest_loses_nothing(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "_actor" / "latest").unlink()
    assert find_checkpoint(tmp_path / "_actor").rollout == 1


def test_the_checkpoints_of_another_program_are_refused(tmp_path):
    (tmp_path / "_actor" / "global_step7").mkdir(parents=True)
    (tmp_path / "_actor" / "latest").write_text("global_step7")
    with pytest.raises(OptionError, match="were not written by this trainer"):
        find_checkpoint(tmp_path / "_actor")


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused_unread(tmp_path):
    """DeepSpeed reads its files by pickle, which runs what a file says; ours hold weights and numbers alone. That its
    own can still be read is what test_end_to_end.py's resumed run shows."""
    from openrlhf_apo.ranks.deepspeed.plain_checkpoints import PlainCheckpoints

    path, marker = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "owned"
    torch.save({"module": Payload(marker)}, path)
    with pytest.raises(RunError, match=r"holds more than weights and numbers, .*posix.system"):
        PlainCheckpoints().load(str(path))
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # it can fail


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_those_before(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))  # as a full disk, for files of this size
    try:
        with pytest.raises(RunError, match=r"global_step2 cannot be written .*; the newest whole one is global_step1"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert find_checkpoint(tmp_path / "_actor").rollout == 1


def test_a_process_that_dies_in_a_save_is_what_the_run_ends_with(tmp_path, monkeypatch):
    """And not that the checkpoint could not be written: --train.max_restarts is for the one and not for the other."""
    saves = checkpoints(tmp_path)

    def dies(tag, state):
        raise ProcessDied("the policy's save_checkpoint failed, its actor died")

    monkeypatch.setattr(saves.policy, "save_checkpoint", dies)
    with pytest.raises(ProcessDied, match="^the policy's save_checkpoint failed, its actor died$"):
        saves.save(1, {})
    assert complete_checkpoints(tmp_path) == []


def test_rotation_never_leaves_none_and_keeps_the_best(tmp_path):
    kept = checkpoints(tmp_path, max_num=1, max_gb=0.0)
    kept.best_key = "eval/pass1"
    for rollout, score in enumerate([0.1, 0.9, 0.5, 0.4], start=1):
        kept.after_rollout(rollout, {"eval/pass1": score}, {"step": rollout})
        tags = {each.folder.name for each in complete_checkpoints(tmp_path / "_actor")}
        assert any(tag.endswith(f"global_step{rollout}") for tag in tags)
    assert tags == {"global_step4", "best_global_step2"}


def test_a_clock_that_jumps_back_does_not_hide_the_newest(tmp_path, monkeypatch):
    clock = iter([1000.0, 500.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path / "_actor").rollout == 2


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert outcome(short, out, "--ckpt.save_steps", "1")[0] == 0
    return out


@pytest.fixture
def resumable(trained, tmp_path) -> Path:
    """The run `trained` as it was after its first rollout."""
    shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "ckpt" / "_actor" / "global_step2")
    return tmp_path / "out"


def test_a_resumed_run_equals_the_uninterrupted_one(short, trained, resumable):
    assert outcome(short, resumable, "--ckpt.save_steps", "1", "--ckpt.load_enable") == (0, "")
    rows = [without_clock(read_metrics(out / "metrics.jsonl")) for out in (trained, resumable)]
    assert rows[0] == rows[1]


def test_a_resumed_run_that_is_asked_to_end_at_once_leaves_its_checkpoint_alone(short, resumable, monkeypatch):
    marker = resumable / "ckpt" / "_actor" / "global_step1" / MARKER
    before = marker.stat().st_mtime_ns

    def stopped(*_):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("openrlhf_apo.trainer.rollouts.EngineRollouts.sample", stopped)
    with pytest.raises(Stopped):
        outcome(short, resumable, "--ckpt.save_steps", "1", "--ckpt.load_enable")
    assert marker.stat().st_mtime_ns == before


CHANGES = {
    "loss": (["--loss", "grpo"], "--loss was apo, now grpo"),
    "group": (["--rollout.n_samples_per_prompt", "8"], "--rollout.n_samples_per_prompt was 4, now 8"),
    "anchor": (["--apo.anchor", "ema"], "--apo.anchor was rollout, now ema"),
    "learning rate": (["--actor.adam.lr", "1e-4"], "--actor.adam.lr was 0.003, now 0.0001"),
    "data": (["--data.max_samples", "12"], "--data.prompt_dataset has another content now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(short, resumable, change):
    flags, difference = CHANGES[change]
    code, error = outcome(short, resumable, "--ckpt.save_steps", "1", "--ckpt.load_enable", *flags)
    assert code == 2 and difference in error and "--ckpt.allow_changed" in error, error
    assert find_checkpoint(resumable / "ckpt" / "_actor").rollout == 1


def test_a_changed_reward_or_model_is_seen_by_its_content(short, flags, resumable, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def reward_func(queries, prompts, labels, **kwargs):\n    return {'rewards': [len(queries[0])]}"
    )
    code, error = outcome(short, resumable, "--ckpt.load_enable", "--reward.remote_url", str(reward))
    assert code == 2 and "--reward has another content now" in error, error
    model = tmp_path / "model"
    shutil.copytree(flags[flags.index("--actor.model_name_or_path") + 1], model)
    for changed, content in {
        "config.json": (model / "config.json").read_bytes().replace(b"{", b'{"another": 1,', 1),
        "model.safetensors": (model / "model.safetensors").read_bytes()[:-4] + b"\1\1\1\1",
    }.items():
        before = (model / changed).read_bytes()
        (model / changed).write_bytes(content)
        code, error = outcome(short, resumable, "--ckpt.load_enable", "--actor.model_name_or_path", str(model))
        assert code == 2 and "--actor.model_name_or_path has another content now" in error, error
        (model / changed).write_bytes(before)


def test_a_change_that_is_allowed_goes_on(short, resumable):
    more = ["--ckpt.load_enable", "--actor.adam.lr", "1e-4", "--ckpt.allow_changed", "actor.adam.lr"]
    assert outcome(short, resumable, *more) == (0, "")
    assert read_metrics(resumable / "metrics.jsonl")[-1]["step"] == 2


def test_a_new_run_moves_the_checkpoints_of_another_aside(short, resumable, caplog):
    assert outcome(short, resumable, "--ckpt.save_steps", "1") == (0, "")
    assert "starting anew: the checkpoints of an earlier run are moved from" in caplog.text
    assert "to _actor.1. To go on from them, stop this run, move them back and give --ckpt.load_enable" in caplog.text
    assert (resumable / "ckpt" / "_actor.1" / "global_step1" / MARKER).exists()
    assert (resumable / "ckpt" / "_actor" / "global_step2" / MARKER).exists()
