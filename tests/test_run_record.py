"""What a run leaves beside its weights: run.json, its last words, the model's card."""

import io
import json
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from openrlhf_apo.embedded.launch import train
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.trainer.hidden import hide_in_addresses
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.model_card import OURS, _card
from openrlhf_apo.trainer.stop import Stopped, StopSignals
from openrlhf_apo.trainer.summary import gains

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SHORT = ["--data.max_samples", "8"]  # one rollout


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
    content = hide_in_addresses(json.dumps(record))
    assert "s3cret" not in content and "http://...@host/score?..." in content
    assert record["settings"]["logger.wandb.key"] == "(not shown)"


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "openrlhf_apo.trainer.loop"]


def test_a_run_ends_with_what_it_gained_and_what_to_type_next(flags, sums, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    run(flags, tmp_path / "out", "--data.max_samples", "16", "--eval.dataset", sums, "--eval.ends")
    lines = said(caplog)[-5:]
    assert re.fullmatch(r"2 of 2 rollouts done in 0 min \d+ s, [\d,]+ tokens/s", lines[0])
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    first, last = rows[1]["reward_mean"], rows[2]["reward_mean"]
    assert lines[1] == f"sampled reward from {first:.3f} to {last:.3f} (one rollout at each end of 2)"
    first, last = rows[0]["eval/score_mean"], rows[2]["eval/score_mean"]
    assert lines[2] == f"held-out eval/score_mean from {first:.3f} to {last:.3f} (after rollouts 0 and 2)"
    assert lines[3] == f"the trained model is in {tmp_path}/out"
    assert lines[4].endswith("python -m openrlhf_apo.cli.report out")


def test_a_run_that_is_stopped_says_so_too(flags, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")

    def check(self):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(StopSignals, "check", check)
    monkeypatch.setattr(StopSignals, "held", lambda self, held=True: nullcontext())
    with pytest.raises(Stopped):
        run(flags, tmp_path, "--data.max_samples", "16")
    assert said(caplog)[-4].startswith("1 of 2 rollouts done in ")
    assert said(caplog)[-2] == "the trained model is not saved; the newest checkpoint is that after rollout 1"
    assert not (tmp_path / "README.md").exists()


def test_the_first_and_the_last_fifth_are_compared():
    rows = [{"step": 0, "eval/pass1": 0.2}] + [{"step": n, "reward_mean": n / 10} for n in range(1, 11)]
    assert gains(rows) == [
        "sampled reward from 0.150 to 0.950 (means of 2 rollouts at each end of 10)",
        "held-out eval/pass1 0.200 (after rollout 0)",
    ]
    assert gains([]) == []


def test_a_model_has_a_card_with_what_it_is_and_how_to_load_it(flags, tiny_model, tmp_path):
    record = run(flags, tmp_path, "--apo.beta_r", "0.5", "--data.max_samples", "16")
    card = (tmp_path / "README.md").read_text()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert (
        card.startswith("---\nlibrary_name: transformers\n") and "base_model:" not in card
    )  # a folder, no hub's name
    assert f"| base model | `{tiny_model}` |" in card and "| loss | `apo`, `--apo.beta_r 0.5` |" in card
    assert "| α | `guarded` (alpha_max 0.9, alpha_min 0.35, " in card
    assert f"; from {rows[0]['alpha']:.3f} to {rows[-1]['alpha']:.3f} |" in card
    assert f"torch {torch.__version__}" in card and f"```bash\n{record['command']}\n```" in card
    assert all(f"- {line}" in card for line in gains(rows))
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].config.vocab_size == 64 and len(scope["tokenizer"]) > 10


def test_a_readme_of_someone_else_stays_and_our_own_is_replaced(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "README.md").write_text("# Mine\n")
    run(flags, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and "README.md was not written by a run" in caplog.text
    (tmp_path / "README.md").write_text(f"{OURS}\nold\n")
    run(flags, tmp_path)
    assert "\nold\n" not in (tmp_path / "README.md").read_text()


def test_a_card_names_the_hubs_base_model_and_what_a_token_loss_was_given(flags):
    argv = [*flags, "--loss", "dapo", "--actor.eps_clip_low_high", "0.1", "0.3"]
    plan = run_plan(resolve(argv), argv)
    plan.record["settings"]["actor.model_name_or_path"] = "Qwen/Qwen3-1.7B"
    card = _card(plan, [])
    assert "\nbase_model: Qwen/Qwen3-1.7B\n" in card and "| α |" not in card
    assert "| loss | `dapo`, `--actor.eps_clip_low_high 0.1 0.3` |" in card
