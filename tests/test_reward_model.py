"""A reward model in this process and in Ray's actors: OpenRLHF's forward, and what is refused."""

import io
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from real_runs import DIGITS_REWARD, succeed
from safetensors.torch import load_file, save_file
from tiny_models import save_reward_model

from openrlhf_apo.cpu import install
from openrlhf_apo.data.inputs import _check_reward_tokenizer, make_tokenizer
from openrlhf_apo.embedded.launch import train
from openrlhf_apo.embedded.reward_model import load_reward_model
from openrlhf_apo.errors import OptionError, RunError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.rewards.model import ModelReward
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.scoring import Scorer
from openrlhf_apo.trainer.stop import StopSignals

pytestmark = pytest.mark.filterwarnings("ignore")

LIMIT = MicroBatchLimit(tokens=64)


def sequences(count: int = 9) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, 60) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


def arguments(path: str, prefix: str = "score", normalize: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        reward=SimpleNamespace(model_name_or_path=path, normalize_enable=normalize),
        ds=SimpleNamespace(value_head_prefix=prefix, attn_implementation="sdpa"),
        actor=SimpleNamespace(trust_remote_code=False),
    )


def openrlhfs(path: str, ids: list[list[int]], prefix: str = "score", normalize: bool = False) -> list[float]:
    """One sequence at a time, without padding, as RewardModelActor loads and calls it."""
    install()
    from openrlhf.models import get_llm_for_sequence_regression

    from openrlhf_apo.cluster.reward_model import set_mean_and_std

    model = get_llm_for_sequence_regression(
        path,
        "reward",
        normalize_reward=normalize,
        attn_implementation="sdpa",
        param_dtype="fp32",
        value_head_prefix=prefix,
    ).eval()
    if normalize:
        set_mean_and_std(model)
    with torch.no_grad():
        return [model(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)).item() for row in ids]


@pytest.mark.parametrize("head, given", [("score", "score"), ("value_head", "value_head"), ("v_head", "score")])
@pytest.mark.parametrize("normalize", [False, True])
def test_rewards_are_openrlhfs(tiny_model, tmp_path, head, given, normalize):
    config = {"mean": 0.3, "std": 2.5} | ({"value_head_prefix": head} if head != given else {})
    path = save_reward_model(tiny_model, tmp_path / "model", head, **config)
    ours = load_reward_model(arguments(path, given, normalize), LIMIT).rate(sequences())
    theirs = openrlhfs(path, sequences(), given, normalize)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert max(ours) - min(ours) > 0.1 and len(ours) == 9


def test_padding_and_micro_batches_change_rounding_only(reward_model):
    rates = [
        load_reward_model(arguments(reward_model), limit).rate(sequences())
        for limit in (MicroBatchLimit(samples=1), MicroBatchLimit(samples=4), MicroBatchLimit(tokens=10_000))
    ]
    assert rates[1] == pytest.approx(rates[0], abs=1e-5) and rates[2] == pytest.approx(rates[0], abs=1e-5)


@pytest.mark.parametrize("actors, duplicates", [(1, 1), (3, 1), (4, 2)])
def test_actors_share_the_sequences_and_rewards_come_back_in_order(monkeypatch, actors, duplicates):
    install()
    from openrlhf_apo.cluster import reward_model

    monkeypatch.setattr(reward_model, "get_all", lambda refs, timeout, what: refs)
    shares = []

    def rate(micro_batches):
        shares.append(sum(map(len, micro_batches)))
        return [float(sum(ids)) for batch in micro_batches for ids in batch]

    actor = SimpleNamespace(rate=SimpleNamespace(remote=rate))
    ray = reward_model.RayRewardModel(LIMIT, 1.0, False)
    ray.group = SimpleNamespace(_actor_handlers=[actor] * actors, duplicate_actors=duplicates)
    assert ray.rate(sequences()) == [float(sum(ids)) for ids in sequences()]
    assert shares == [-(-9 * duplicates // actors)] * actors


def test_a_reward_that_is_not_finite_is_a_failure():
    samples = [Sample(g, f"p{g}", "", "", [1, 2], [g], "r", [-1.0], False) for g in range(3)]
    seen = []

    def rate(ids):
        seen.extend(ids)
        return [0.5, math.nan, -math.inf]

    scorer = Scorer(ModelReward(rate), 2)
    (kept,) = scorer.score(samples)
    assert kept.reward == 0.5 and scorer.failures == 2 and seen == [[1, 2, 0], [1, 2, 1], [1, 2, 2]]
    with pytest.raises(RunError, match="the reward is nan"):
        Scorer(ModelReward(rate), 0).score(samples)


def without_reward(flags: list[str]) -> list[str]:
    at = flags.index("--reward.remote_url")
    return [*flags[:at], *flags[at + 2 :]]


def embedded(flags: list[str], out, *more: str) -> list[dict]:
    args = resolve([*flags, "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt"), *more])
    assert args.runtime == "embedded"
    train(run_plan(args), args, io.StringIO(), StopSignals())
    return read_metrics(out / "metrics.jsonl")


FEW = "--data.max_samples 16 --rollout.n_samples_per_prompt 4 --train.batch_size 16".split()


def saved_rewards(out) -> tuple[list[list[int]], list[float]]:
    samples = [s for number in (1, 2) for s in RolloutFiles(str(out / "rollouts")).read(number)]
    return [s.prompt_ids + s.response_ids for s in samples], [s.reward for s in samples]


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_a_run_with_a_reward_model_alone(flags, sums, reward_model, tmp_path, loss):
    more = ["--loss", loss, "--reward.model_name_or_path", reward_model, "--apo.save_rollouts", f"{tmp_path}/rollouts"]
    more += ["--eval.dataset", sums, "--eval.ends", "--algo.dynamic_filtering_enable"]
    rows = embedded(without_reward(flags), tmp_path, *FEW, *more)
    assert [row["step"] for row in rows] == [0, 1, 2] and "eval/score_mean" in rows[2]
    ids, rewards = saved_rewards(tmp_path)
    assert rewards == pytest.approx(openrlhfs(reward_model, ids), abs=1e-5)
    assert "the reward model" in (tmp_path / "README.md").read_text()


def test_a_run_with_a_reward_model_beside_a_function(flags, reward_model, tmp_path):
    more = ["--reward.model_name_or_path", reward_model, "--reward.weights", "1", "0.5"]
    rows = embedded(flags, tmp_path, *FEW, *more)
    for row in rows:
        assert row["reward_mean"] == pytest.approx(row["reward/digits"] + 0.5 * row["reward/model"], abs=1e-12)
        assert row["score_mean"] == pytest.approx(row["reward/digits"], abs=1e-12)


def refused(flags: list[str], *more: str) -> str:
    with pytest.raises(OptionError) as error:
        run_plan(resolve([*without_reward(flags), *more]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_reward_model_is_refused_before_anything_starts(flags, tiny_model, reward_model, tmp_path):
    model = "--reward.model_name_or_path"
    assert "has no value head score.weight: it is no reward model" in refused(flags, model, tiny_model)
    other = save_reward_model(tiny_model, tmp_path / "other", "value_head")
    assert "(value_head is there)" in refused(flags, model, other)
    stated = save_reward_model(tiny_model, tmp_path / "stated", "v", value_head_prefix="v")
    assert "says v; drop it" in refused(flags, model, stated, "--ds.value_head_prefix", "value_head")
    assert "has no mean and std" in refused(flags, model, reward_model, "--reward.normalize_enable")
    assert "nowhere: no such folder" in refused(flags, model, "/nowhere")
    assert "--reward.num_nodes has no effect with --runtime embedded" in refused(
        flags, model, reward_model, "--reward.num_nodes", "1", "--runtime", "embedded"
    )
    assert "has no effect without --reward.model_name_or_path" in refused(
        flags, "--reward", "math_verify", "--reward.normalize_enable"
    )
    assert "where only a model scores" in refused(flags, model, reward_model, "--reward.timeout", "5")
    code = save_reward_model(tiny_model, tmp_path / "code", auto_map={"AutoConfig": "x.X"})
    assert "brings its own code" in refused(flags, model, code)
    (tmp_path / "stated" / "model.safetensors").unlink()
    assert "has no weights in safetensors" in refused(flags, model, stated)


def test_a_reward_model_with_another_tokenizer_is_refused(flags, tiny_model, tmp_path):
    other = save_reward_model(tiny_model, tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(OptionError, match="has another tokenizer than the policy"):
        embedded(without_reward(flags), tmp_path / "out", "--reward.model_name_or_path", other)
    for file in (tmp_path / "other").glob("*token*"):
        file.unlink()
    args = resolve([*without_reward(flags), "--reward.model_name_or_path", other])
    _check_reward_tokenizer(other, False, make_tokenizer(args))


def test_weights_that_another_class_has_are_named(tiny_model, tmp_path):
    path = save_reward_model(tiny_model, tmp_path / "model")
    weights = load_file(f"{path}/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, f"{path}/model.safetensors", {"format": "pt"})
    with pytest.raises(OptionError, match="it lacks model.norm.weight: use --runtime ray"):
        load_reward_model(arguments(path), LIMIT)


@pytest.mark.slow
def test_a_run_on_ray_with_two_actors_of_a_reward_model_beside_a_function(flags, tiny_model, tmp_path):
    reward_model = save_reward_model(tiny_model, tmp_path / "model", mean=0.3, std=2.5)
    (tmp_path / "digits.py").write_text(DIGITS_REWARD)
    more = ["--reward", str(tmp_path / "digits.py"), "--reward.model_name_or_path", reward_model]
    more += ["--reward.weights", "0", "1", "--reward.normalize_enable", "--reward.num_gpus_per_node", "2"]
    more += ["--apo.save_rollouts", f"{tmp_path}/rollouts", "--rollout.vllm_generate_batch_size", "12"]
    rows = succeed(without_reward(flags), tmp_path, *FEW, *more)
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["surplus_groups"] == 4
    ids, rewards = saved_rewards(tmp_path)
    assert rewards == pytest.approx(openrlhfs(reward_model, ids, normalize=True), abs=1e-4)
    for row in rows:
        assert row["reward_mean"] == pytest.approx(row["reward/model"], abs=1e-12) and row["grad_norm"] > 0
        assert row["score_mean"] == pytest.approx(row["reward/digits"], abs=1e-12)
