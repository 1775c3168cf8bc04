"""Several rewards, added up by weight."""

import io
import math

import pytest

import openrlhf_apo
from openrlhf_apo.data.inputs import _reward
from openrlhf_apo.errors import OptionError, RunError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.rewards.function import FunctionReward
from openrlhf_apo.rewards.reward import Reward
from openrlhf_apo.rewards.weighted import WeightedReward
from openrlhf_apo.trainer.evaluation import Evaluation
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.prompts import PromptRow
from openrlhf_apo.trainer.rollouts import GroupFilter
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.scoring import Scorer
from openrlhf_apo.trainer.stop import StopSignals

pytestmark = pytest.mark.filterwarnings("ignore")


def sample(response: str, group: int = 0, label: object = "7") -> Sample:
    return Sample(group, "p ", label, "", [1], [2], response, [-1.0], False)


def right(prompt, response, label):
    return float(response.endswith(label))


def short(prompt, response, label):
    return 1 / len(response)


class Detailed:
    """A reward with a score and a log of its own, which leaves answers out once one failed."""

    not_verified = 3

    def check_label(self, label):
        return None if label else "no label"

    def __call__(self, answers, max_failures):
        self.not_verified += 1
        return [Reward(2.0, 0.5, {"digits": 4.0}) if answer.response != "left out" else None for answer in answers]


def test_the_reward_is_the_weighted_sum_and_the_score_is_the_first_ones():
    scorer = Scorer(WeightedReward({"right": (FunctionReward(right), 1.0), "short": (FunctionReward(short), -0.5)}), 0)
    one, other = scorer.score([sample("ab 7"), sample("abcde 8")])
    assert (one.reward, one.score, one.extra) == (1 - 0.5 / 4, 1.0, {"right": 1.0, "short": 1 / 4})
    assert (other.reward, other.score) == (-0.5 / 7, 0.0)
    assert not GroupFilter((0.5, 0.6))([one, one, other]) and GroupFilter((0.3, 0.6))([one, other])


def test_a_parts_own_score_logs_labels_and_counts_are_kept():
    reward = WeightedReward({"detailed": (Detailed(), 2.0), "right": (FunctionReward(right), 1.0)})
    scorer = Scorer(reward, 0)
    (scored,) = scorer.score([sample("7")])
    assert (scored.reward, scored.score) == (5.0, 0.5)
    assert scored.extra == {"detailed": 2.0, "detailed/digits": 4.0, "right": 1.0}
    assert reward.check_label("") == "no label" and reward.check_label("7") is None
    assert scorer.metrics()["verifier_failures"] == 1
    (left_out,) = reward([sample("left out")], 0)
    assert left_out is None


def test_a_failure_of_any_part_is_one_of_the_sample_and_says_whose():
    parts = {
        "right": (FunctionReward(right), 1.0),
        "even": (FunctionReward(lambda p, r, label: 1 / (len(r) - 2)), 1.0),
    }
    with pytest.raises(RunError, match="the reward even raised ZeroDivisionError"):
        Scorer(WeightedReward(parts), 0).score([sample("ab")])
    parts["right"] = (FunctionReward(lambda p, r, label: 1 / (len(r) - 2)), 1.0)  # both fail on the same answer
    scorer = Scorer(WeightedReward(parts), 1)
    assert [s.group_id for s in scorer.score([sample("ab", 1), sample("abc", 1), sample("abc", 2)])] == [2]
    assert scorer.failures == 1


def test_an_evaluation_shows_the_first_reward():
    class Engine:
        def generate(self, prompts, settings):
            return [sample(answer, prompt.group_id) for prompt in prompts for answer in ("a 7", "b 8")]

    scorer = Scorer(WeightedReward({"right": (FunctionReward(right), 1.0), "short": (FunctionReward(short), 0.1)}), 0)
    evaluation = Evaluation([PromptRow("p", "7")], SamplingSettings(2, 1.0, 1.0, 4, 64, 0), 1, False)
    metrics = evaluation.run(Engine(), scorer)
    assert metrics["eval/pass1"] == 0.5 and metrics["eval/pass2"] == 1.0


@pytest.fixture
def base(tiny_model, sums, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    for name, value in (("format", "float('=' in queries[0])"), ("other", "0.0")):
        text = f"def reward_func(queries, prompts, labels, **kwargs):\n    return {{'rewards': [{value}]}}\n"
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "format.py").write_text(text)
    return ["--actor.model_name_or_path", tiny_model, "--data.prompt_dataset", sums]


SERVERS = "http://a/1,https://b/2"


def test_each_word_of_reward_is_one_and_commas_are_servers(base):
    words = ["--reward", "math_verify", "format.py", SERVERS, "http://c"]
    parts = run_plan(resolve([*base, *words, "--reward.weights", "1", "0.2", "-1", "0"])).reward.parts
    assert [(part.name, part.weight, part.timeout) for part in parts] == [
        ("math_verify", 1.0, 10.0),
        ("format", 0.2, 180.0),
        ("server", -1.0, 900.0),
        ("server_2", 0.0, 900.0),
    ]
    assert parts[2].urls == SERVERS.split(",")
    parts = run_plan(resolve([*base, "--reward", "math_verify", "format.py", "--reward.timeout", "5"])).reward.parts
    assert [(part.weight, part.timeout) for part in parts] == [(1.0, 5.0)] * 2
    config = ["--config", "run.yaml"]
    open("run.yaml", "w").write("reward: [math_verify, format.py]\nreward.weights: [1, 0.5]\n")
    assert [part.weight for part in run_plan(resolve([*base, *config])).reward.parts] == [1.0, 0.5]
    for word in ("format.py", SERVERS):
        assert not isinstance(_reward(run_plan(resolve([*base, "--reward", word])).reward, None), WeightedReward)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--reward math_verify,format.py", "give several rewards as words: --reward math_verify format.py"),
        ("--reward.remote_url format.py,other.py", "--reward.remote_url format.py,other.py: commas are for several"),
        ("--reward http://a,format.py", "commas are for several servers"),
        ("--reward math_verify nowhere.py", "--reward nowhere.py: no such file"),
        ("--reward math_verify mth", "--reward mth: no such reward"),
        ("--reward format.py sub/format.py", "two rewards are called format: rename a file"),
        ("--reward math_verify format.py --reward.weights 1", "1 weights for 2 rewards: give one for each"),
        ("--reward math_verify format.py --reward.weights 1 nan", "must be finite numbers"),
        ("--reward math_verify --reward.weights 1", "--reward.weights has no effect with one reward"),
        ("--reward format.py --reward.weights 1", "--reward.weights has no effect with one reward"),
        ("--reward math_verify --reward.isolate", "where the reward is no .py file"),
        ("--reward math_verify --reward.max_failures 1", "with --reward math_verify, for which"),
    ],
)
def test_rewards_that_cannot_be_added_up_are_one_line(base, words, message):
    with pytest.raises(OptionError) as error:
        run_plan(resolve([*base, *words.split()]))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_goes_with_one_of_several(base):
    run_plan(resolve([*base, *"--reward math_verify format.py --reward.isolate --reward.max_failures 1".split()]))


def test_a_run_with_several_rewards(base, tmp_path):
    from openrlhf_apo.embedded.launch import train

    sizes = "--rollout.batch_size 4 --rollout.n_samples_per_prompt 4 --train.batch_size 16 --data.max_samples 8"
    sizes += " --rollout.max_new_tokens 6 --data.max_len 48 --ckpt.output_dir out --ckpt.path out/ckpt"
    args = resolve([*base, *sizes.split(), *"--reward math_verify format.py --reward.weights 1 0.25".split()])
    train(run_plan(args), args, io.StringIO(), StopSignals())
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row["reward/format"] == 1.0 and row["score_mean"] == row["reward/math_verify"]
        assert row["reward_mean"] == pytest.approx(row["reward/math_verify"] + 0.25)
    assert "1 x `math_verify` + 0.25 x `format.py`" in (tmp_path / "out" / "README.md").read_text()


def test_several_rewards_from_python(tiny_model, tmp_path):
    sizes = {
        "rollout": {"batch_size": 4, "n_samples_per_prompt": 4, "max_new_tokens": 6},
        "train": {"batch_size": 16},
        "data.max_len": 48,
    }
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(4)]
    to = {"output": str(tmp_path), "console": io.StringIO()}
    (row,) = openrlhf_apo.train(tiny_model, rows, {"right": (right, 1.0), "short": (short, 0.5)}, **to, **sizes)
    assert row["reward_mean"] == pytest.approx(row["reward/right"] + 0.5 * row["reward/short"], rel=1e-12)
    for wrong in ({}, {"right": right}, {"right": (right, math.nan)}, {"right": ("right", 1.0)}):
        with pytest.raises(OptionError, match="reward_func"):
            openrlhf_apo.train(tiny_model, rows, wrong, **to, **sizes)
