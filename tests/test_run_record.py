"""What a run leaves beside its model: run.json."""

import io
import json
from pathlib import Path

import pytest
import torch

from openrlhf_apo.embedded.launch import train
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.trainer.stop import StopSignals

pytestmark = pytest.mark.filterwarnings("ignore")

SHORT = ["--data.max_samples", "8"]  # one rollout


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(flags: list[str], out: Path, *more: str) -> dict:
    argv = [*flags, "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt"), *SHORT, *more]
    args = resolve(argv)
    train(run_plan(args, argv), args, io.StringIO(), StopSignals())
    return json.loads((out / "run.json").read_text())


def test_run_json_says_what_was_asked_for_and_what_came_of_it(flags, tmp_path):
    record = run(flags, tmp_path, "--apo.beta_r", "0.5", "--train.seed", "7")
    assert record["command"].startswith("python -m openrlhf_apo.cli.train_apo_ray --actor.model_name_or_path ")
    assert record["command"].endswith("--apo.beta_r 0.5 --train.seed 7")
    assert record["given"]["apo.beta_r"] == {"value": 0.5, "from": "command line"}
    assert record["settings"]["apo.beta_r"] == 0.5 and record["settings"]["apo.tau_anc"] == 0.8
    assert "apo.tau_anc" not in record["given"] and record["given_to_the_loss"] == {"apo.beta_r": 0.5}
    assert (record["seed"], record["runtime"], record["device"]) == (7, "embedded", "cpu")
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["openrlhf_apo"]
    assert set(record["fingerprints"]) == {"model", "data", "reward"}
    assert all(value.startswith("sha256:") for value in record["fingerprints"].values())
    (start,) = record["starts"]
    assert start["resumed_after"] is None and start["started"] == record["started"] and "settings" not in start


def test_a_resumed_run_adds_its_start_and_a_new_one_moves_the_file_aside(flags, tmp_path):
    first = run(flags, tmp_path, "--ckpt.save_steps", "1")
    resumed = run(flags, tmp_path, "--ckpt.save_steps", "1", "--ckpt.load_enable")
    assert resumed["starts"][0] == first["starts"][0]
    assert [start["resumed_after"] for start in resumed["starts"]] == [None, 1]
    assert resumed["command"].endswith("--ckpt.load_enable")
    assert len(run(flags, tmp_path)["starts"]) == 1
    assert json.loads((tmp_path / "run.json.1").read_text()) == resumed


def test_run_json_shows_no_secret(flags, monkeypatch):
    monkeypatch.setattr("openrlhf_apo.options.effects.find_spec", lambda name: True)  # wandb's
    flags = [*flags[: flags.index("--reward.remote_url")], "--rollout.max_new_tokens", "12"]
    argv = [*flags, "--logger.wandb.key", "s3cret", "--reward", "http://me:s3cret@host/score?token=s3cret&n=1"]
    record = run_plan(resolve(argv), argv).record
    from openrlhf_apo.trainer.run_record import hide_in_addresses

    content = hide_in_addresses(json.dumps(record))
    assert "s3cret" not in content and "http://...@host/score?..." in content
    assert record["settings"]["logger.wandb.key"] == "(not shown)"
