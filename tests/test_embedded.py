"""The embedded runtime: the engine's samples, and runs that equal themselves."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from real_runs import without_clock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer

from openrlhf_apo.embedded.cache import RoomyLayer
from openrlhf_apo.embedded.engine import EmbeddedEngine, choose
from openrlhf_apo.embedded.launch import train
from openrlhf_apo.errors import OptionError, RunError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import RolloutFiles, saved_rollouts
from openrlhf_apo.trainer.samples import Prompt, whole_groups
from openrlhf_apo.trainer.stop import StopSignals

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SAMPLING = SamplingSettings(samples_per_prompt=4, temperature=1.0, top_p=1.0, max_new_tokens=12, max_len=48, seed=3)


@pytest.fixture(scope="module")
def engine(tiny_model) -> EmbeddedEngine:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return EmbeddedEngine(model, AutoTokenizer.from_pretrained(tiny_model))


def prompts(count: int = 6) -> list[Prompt]:
    return [Prompt(g, "1+" * (g % 3) + f"{g}=", "", "", solution="12345678") for g in range(count)]


def changed(settings: SamplingSettings, **fields) -> SamplingSettings:
    return SamplingSettings(**(vars(settings) | fields))


def test_samples_come_in_prompt_order_with_the_log_probs_of_the_policy(engine):
    samples = engine.generate(prompts(), SAMPLING)
    assert [s.group_id for s in samples] == [g for g in range(6) for _ in range(4)]
    assert len({tuple(s.response_ids) for s in samples}) > 12
    for s in samples:
        logits = engine.model(torch.tensor([s.prompt_ids + s.response_ids])).logits[0, :-1]
        want = logits.log_softmax(-1)[len(s.prompt_ids) - 1 :].gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0]
        assert s.rollout_log_probs == pytest.approx(want.tolist(), abs=1e-5)
        ended = s.response_ids[-1] in engine.stop_ids
        assert s.truncated == (not ended) and len(s.response_ids) <= 12 and (ended or len(s.response_ids) == 12)
        assert not any(token in engine.stop_ids for token in s.response_ids[:-1])


def test_an_answer_does_not_depend_on_which_others_share_its_batch(engine):
    together = engine.generate(prompts(), SAMPLING)
    alone = [s for p in prompts() for s in engine.generate([p], SAMPLING)]
    small = EmbeddedEngine(engine.model, engine.tokenizer, batch=8).generate(prompts(), SAMPLING)
    for other in (alone, small):
        assert [s.response_ids for s in other] == [s.response_ids for s in together]
    another = engine.generate(prompts(), changed(SAMPLING, seed=4))
    assert [s.response_ids for s in another] != [s.response_ids for s in together]


def test_a_layer_with_room_holds_what_one_that_grows_holds():
    roomy, growing = RoomyLayer(room=6), DynamicLayer()
    generator = torch.Generator().manual_seed(0)

    def add(rows: int, tokens: int) -> None:
        new = torch.randn(2, rows, 3, tokens, 4, generator=generator)
        for mine, wanted in zip(roomy.update(*new), growing.update(*new), strict=True):
            assert torch.equal(mine, wanted)

    add(2, 5)
    for layer in (roomy, growing):
        layer.batch_repeat_interleave(2)
    add(4, 1)
    room = roomy.buffers
    add(4, 2)
    assert roomy.buffers is room  # nothing was copied
    for layer in (roomy, growing):
        layer.batch_select_indices(torch.tensor([0, 3]))
    add(2, 1)
    add(2, 2)
    assert roomy.get_seq_length() == growing.get_seq_length() == 11


def test_greedy_answers_are_the_likeliest_tokens(engine):
    (sample,) = engine.generate(prompts(1), changed(SAMPLING, temperature=0.0, samples_per_prompt=1))
    ids = list(sample.prompt_ids)
    for token in sample.response_ids:
        assert engine.model(torch.tensor([ids])).logits[0, -1].argmax() == token
        ids.append(token)


def test_guided_answers_go_on_from_a_prefix_and_differ_from_the_free_ones(engine):
    free = engine.generate(prompts(2), SAMPLING)
    guided = engine.generate(prompts(2), SAMPLING, prefix=lambda ids: ids[:3])
    assert all(len(g.prompt_ids) == len(f.prompt_ids) + 3 for f, g in zip(free, guided, strict=True))
    assert [s.response_ids for s in guided] != [s.response_ids for s in free]


def test_a_prompt_that_leaves_no_room_is_named(engine):
    with pytest.raises(RunError, match="raise --data.max_len"):
        engine.generate([Prompt(0, "1+" * 30, "", "")], SAMPLING)


def test_tokens_are_drawn_from_the_distribution_and_log_probs_are_its():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).repeat(20_000, 1)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        tokens, log_probs = choose(logits, uniforms, changed(SAMPLING, temperature=temperature, top_p=top_p))
        p = (logits[0] / temperature).softmax(-1)
        if top_p < 1:
            p = torch.tensor([0.0, p[1], 0.0, p[3]]) / (p[1] + p[3])  # 0.24 + 0.64 reach 0.8
        found = torch.bincount(tokens, minlength=4) / 20_000
        assert (found - p).abs().max() < 1e-4
        assert torch.allclose(log_probs, p[tokens].log(), atol=1e-5)


@pytest.mark.parametrize("size", [5, 128, 300])
def test_a_token_of_probability_0_is_never_drawn(size):
    logits = torch.full((4, size), -torch.inf)
    logits[:, size // 2] = torch.tensor([0.0, 1e4, -1e4, 3.0])
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53, 2**-60], dtype=torch.float64)
    tokens, log_probs = choose(logits, uniforms, SAMPLING)
    assert tokens.tolist() == [size // 2] * 4 and log_probs.tolist() == [0.0] * 4


def test_in_a_large_vocabulary_a_token_is_where_the_running_sum_passes():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, 1000, generator=generator)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    tokens, _ = choose(logits, uniforms, SAMPLING)
    after = logits.double().softmax(-1).cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    before = after - logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert ((before <= uniforms + 1e-6) & (uniforms <= after + 1e-6)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs.


def run(flags: list[str], out: Path, *more: str) -> list[dict]:
    args = resolve([*flags, "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt"), *more])
    train(run_plan(args), args, io.StringIO(), StopSignals())
    return read_metrics(out / "metrics.jsonl")


def weights(out: Path) -> dict:
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("loss", ["apo", "gtpo", "dapo"])
def test_equal_seeds_give_equal_runs(flags, tmp_path, loss):
    one, other = (run(flags, tmp_path / name, "--loss", loss, "--data.max_samples", "16") for name in "ab")
    assert without_clock(one) == without_clock(other)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(row["rollout_mismatch"] < 1e-5 for row in one)
    assert one[-1]["grad_norm"] > 0 and one[-1]["log_ratio_std"] > 0


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_the_policys_own_change_is_no_mismatch_of_the_engine(flags, tmp_path, loss):
    files = RolloutFiles(str(tmp_path / "rollouts"))
    few = ["--data.max_samples", "24", "--rollout.vllm_generate_batch_size", "20", "--apo.max_mismatch", "1e-4"]
    rows = run(flags, tmp_path, "--loss", loss, *few, "--apo.save_rollouts", str(files.directory))
    assert [row["stale_groups"] for row in rows] == [0, 8, 4] and [row["surplus_groups"] for row in rows] == [12, 4, 0]
    assert [row.get("rollout_mismatch", 0.0) < 1e-5 for row in rows] == [True] * 3
    assert ["rollout_mismatch" in row for row in rows] == [True, False, True]
    # The files hold what was trained on: another run from them alone ends in the same weights.
    stale = [[group[0].stale for group in whole_groups(files.read(number), 8)] for number in (1, 2, 3)]
    assert stale == [[False] * 8, [True] * 8, [False] * 4 + [True] * 4]
    kept = [*flags[: flags.index("--data.prompt_dataset")], "--apo.load_rollouts", str(files.directory)]
    run(kept, tmp_path / "again", "--loss", loss)
    a, b = weights(tmp_path), weights(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_new_run_moves_the_saved_rollouts_of_another_aside(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, prompts in (("a", "24"), ("b", "16")):
        run(flags, tmp_path / folder, "--data.max_samples", prompts, "--apo.save_rollouts", "rollouts")
    assert RolloutFiles("rollouts").rollouts() == [1, 2] and len(list(Path("rollouts").glob("*.jsonl.1"))) == 3
    monkeypatch.chdir(tmp_path / "a")  # a run's record says where they are, seen from anywhere
    assert saved_rollouts(tmp_path / "b").directory == tmp_path / "rollouts"


RESUMABLE = ["--apo.anchor", "lagged", "--apo.anchor_interval", "2", "--ckpt.save_steps", "1", "--adrpo.enable"]


def test_a_resumed_run_equals_the_uninterrupted_one(flags, sums, tmp_path, monkeypatch, caplog):
    from openrlhf_apo.trainer import loop

    more = [*RESUMABLE, "--eval.dataset", sums, "--eval.steps", "2", "--eval.n_samples_per_prompt", "2"]
    straight = run(flags, tmp_path / "straight", *more)
    log = loop.Trainer._log

    def killed(self, row, view):
        log(self, row, view)
        if row["step"] == 3:
            raise KeyboardInterrupt  # after the line, before the checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_log", killed)
        with pytest.raises(KeyboardInterrupt):
            run(flags, tmp_path / "resumed", *more)
    resumed = run(flags, tmp_path / "resumed", *more, "--ckpt.load_enable")
    assert without_clock(resumed) == without_clock(straight)
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    before = (tmp_path / "resumed" / "metrics.jsonl").read_text()
    caplog.set_level("INFO")
    run(flags, tmp_path / "resumed", *more, "--ckpt.load_enable")
    assert "nothing left to train" in caplog.text
    assert (tmp_path / "resumed" / "metrics.jsonl").read_text() == before


def test_resuming_with_what_the_checkpoint_does_not_know_is_one_line(flags, tmp_path):
    few = ["--data.max_samples", "16", "--ckpt.save_steps", "1"]
    run(flags, tmp_path, *few)
    guided = ["--ckpt.load_enable", "--guidance.enable", "--guidance.length", "2"]
    with pytest.raises(OptionError, match="--guidance.enable was False, now True"):
        run(flags, tmp_path, *few, *guided)
    allowed = ["--ckpt.allow_changed", "guidance.enable", "guidance.length", "data.prompt_dataset"]
    with pytest.raises(RunError, match="has no state of guidance: resume with the version and flags"):
        run(flags, tmp_path, *few, *guided, *allowed)


def test_checkpoints_rotate_and_the_best_is_kept(flags, sums, tmp_path):
    more = ["--ckpt.save_steps", "1", "--ckpt.max_num", "2", "--eval.dataset", sums, "--eval.steps", "1"]
    run(flags, tmp_path, *more, "--data.max_samples", "40")
    kept = sorted(path.name for path in (tmp_path / "ckpt" / "_actor").iterdir() if path.is_dir())
    best = [name for name in kept if name.startswith("best")]
    assert len(best) == 1 and len(kept) - len(best) == 2 and "global_step5" in kept
    marker = json.loads((tmp_path / "ckpt" / "_actor" / best[0] / "complete.json").read_text())
    assert math.isfinite(marker["metric"])


def test_a_checkpoint_of_the_cluster_is_named(flags, tmp_path):
    few = ["--data.max_samples", "16", "--ckpt.save_steps", "1"]
    run(flags, tmp_path, *few)
    newest = tmp_path / "ckpt" / "_actor" / "global_step2"
    marker = json.loads((newest / "complete.json").read_text())
    (newest / "complete.json").write_text(json.dumps(marker | {"sizes": {}}))  # as one without the file embedded.pt
    with pytest.raises(RunError, match="one of --runtime ray"):
        run(flags, tmp_path, *few, "--ckpt.load_enable")
