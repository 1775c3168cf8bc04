"""When the policy is evaluated and saved, and what a reward function says beside its reward."""

import json

import pytest

from openrlhf_apo.rewards.remote import RemoteReward
from openrlhf_apo.trainer.checkpoints import Checkpoints
from openrlhf_apo.trainer.evaluation import Evaluation
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.loop import _sample_metrics
from openrlhf_apo.trainer.metrics import held_out
from openrlhf_apo.trainer.prompts import PromptRow
from openrlhf_apo.trainer.rollouts import GroupFilter
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore")


class SavingPolicy:
    """PolicyHandle that notes what it saves."""

    def __init__(self):
        self.saved: list[tuple] = []

    def save_checkpoint(self, tag, trainer_state):
        self.saved.append((tag, json.loads(json.dumps(trainer_state))))


def train(checkpoints: Checkpoints, scores: list[float | None]) -> None:
    for rollout, score in enumerate(scores, start=1):
        row = {"step": rollout} | ({} if score is None else {"eval/pass1": score})
        checkpoints.after_rollout(rollout, row, {"step": rollout})


def test_the_best_checkpoint_is_kept_beside_the_regular_ones_and_carries_its_metric():
    policy = SavingPolicy()
    train(Checkpoints(policy, None, every=2, best_key=""), [0.5, None, 0.4, 0.6])
    tags = [tag for tag, _ in policy.saved]
    assert tags == ["best_global_step1", "global_step2", "global_step4", "best_global_step4"]
    assert [state["checkpoints"]["latest"] for _, state in policy.saved] == [0.5, 0.5, 0.6, 0.6]


def test_a_resumed_run_remembers_what_was_best():
    policy = SavingPolicy()
    train(Checkpoints(policy, None, every=None, best_key=""), [0.5])
    resumed = Checkpoints(policy, None, every=None, best_key="")
    resumed.load_state_dict(policy.saved[-1][1]["checkpoints"])
    train(resumed, [0.4])
    assert [tag for tag, _ in policy.saved] == ["best_global_step1"]


def test_none_keeps_no_best_and_another_key_decides():
    policy = SavingPolicy()
    train(Checkpoints(policy, None, every=None, best_key="none"), [0.5])
    assert policy.saved == []
    Checkpoints(policy, None, None, "eval/pass4").after_rollout(3, {"eval/pass1": 1.0, "eval/pass4": 0.2}, {})
    tag, state = policy.saved[0]
    assert tag == "best_global_step3" and state["checkpoints"]["latest"] == 0.2


@pytest.mark.parametrize("best_key", ["", "eval/pass1", "eval/score_mean"])
def test_the_best_of_graded_rewards_goes_by_their_mean_under_either_name(best_key):
    policy = SavingPolicy()
    checkpoints = Checkpoints(policy, None, every=None, best_key=best_key)
    for rollout, row in enumerate([{"eval/pass1": 0.0}, {"eval/score_mean": 0.3}, {"eval/score_mean": 0.2}], start=1):
        checkpoints.after_rollout(rollout, {"step": rollout} | row, {})
    assert [tag for tag, _ in policy.saved] == ["best_global_step1", "best_global_step2"]


class Answers:
    """Engine and scorer in one: two answers to each prompt, with these rewards."""

    def __init__(self, rewards: list[float]):
        self.rewards = rewards

    def generate(self, prompts, settings):
        two = [prompt for prompt in prompts for _ in range(2)]
        return [
            Sample(p.group_id, p.text, "", p.datasource, [1], [2], f"answer {reward}", [-1.0], False, reward=reward)
            for p, reward in zip(two, self.rewards, strict=True)
        ]

    def score(self, samples):
        return samples


def evaluate(rewards: list[float]) -> dict[str, float]:
    rows = [PromptRow("p", "", datasource="one"), PromptRow("q", "", datasource="two")]
    answers = Answers(rewards)
    metrics = Evaluation(rows, SamplingSettings(2, 1.0, 1.0, 4, 64, 0), 1, False).run(answers, answers)
    return {key: value for key, value in metrics.items() if "response_length" not in key and "truncated" not in key}


def test_only_rewards_of_0_and_1_are_a_pass_rate():
    binary = {
        **{"eval/pass1": 0.75, "eval/pass2": 1.0, "eval/distinct_right": 1.0},
        **{"eval/one/pass1": 0.5, "eval/one/pass2": 1.0, "eval/one/distinct_right": 1.0},
        **{"eval/two/pass1": 1.0, "eval/two/pass2": 1.0, "eval/two/distinct_right": 1.0},
    }
    assert evaluate([0, 1, 1, 1]) == evaluate([False, True, 1, 1]) == binary
    graded = {
        "eval/score_mean": 0.5,
        "eval/score_best2": 0.75,
        "eval/distinct_right": 1.5,
        **{"eval/one/score_mean": 0.25, "eval/one/score_best2": 0.5, "eval/one/distinct_right": 1.0},
        **{"eval/two/score_mean": 0.75, "eval/two/score_best2": 1.0, "eval/two/distinct_right": 2.0},
    }
    assert evaluate([0, 0.5, 0.5, 1]) == graded
    assert "eval/score_mean" in evaluate([-1, 1, 1, 1])


def test_an_evaluation_of_which_no_group_is_left_has_no_result(caplog):
    answers = Answers([])
    answers.generate = lambda prompts, settings: []
    evaluation = Evaluation([PromptRow("p", "")], SamplingSettings(2, 1.0, 1.0, 4, 64, 0), 1, False)
    assert evaluation.run(answers, answers) == {} and "has no result" in caplog.text


def test_one_graded_evaluation_makes_all_of_a_run_graded():
    rows = [{"step": 0, "eval/pass1": 0.0}, {"step": 1}, {"step": 2, "eval/score_mean": 0.25}]
    assert held_out(rows) == ("eval/score_mean", [(0, 0.0), (2, 0.25)])
    assert held_out(rows[:2]) == ("eval/pass1", [(0, 0.0)]) and held_out(rows[1:2])[1] == []


@pytest.mark.parametrize(
    ("every", "ends", "due"),
    [(None, False, []), (2, False, [2, 4]), (None, True, [0, 5]), (2, True, [0, 2, 4, 5])],
)
def test_evaluation_is_due_as_in_openrlhf_and_at_the_ends_where_asked(every, ends, due):
    evaluation = Evaluation([PromptRow("p", "")], SamplingSettings(1, 0.0, 1.0, 4, 64, 0), every, ends)
    assert [rollout for rollout in range(6) if evaluation.is_due(rollout, last=rollout == 5)] == due


REWARD = """
def reward_func(queries, prompts, labels, **kwargs):
    correct = float(queries[0].endswith(labels[0]["answer"]))
    return {"rewards": [correct - 0.5], "scores": [correct], "extra_logs": {"length": len(queries[0])}}
"""


def test_scores_and_extra_logs_of_a_reward_function_reach_the_filter_and_the_metrics(tmp_path):
    path = tmp_path / "reward.py"
    path.write_text(REWARD)
    label = {"answer": "2"}  # as it is in the data
    samples = [Sample(0, "1+1=", label, "", [1], [2], answer, [-1.0], False) for answer in ("2", "33")]
    Scorer(RemoteReward([str(path)], timeout=10.0), 0).score(samples)
    assert [(s.reward, s.score, s.extra) for s in samples] == [
        (0.5, 1.0, {"length": 5.0}),
        (-0.5, 0.0, {"length": 6.0}),
    ]
    assert GroupFilter((0.4, 0.6))(samples)  # the mean score is 0.5, the mean reward 0
    metrics = _sample_metrics(samples)
    assert (metrics["reward_mean"], metrics["score_mean"], metrics["reward/length"]) == (0.0, 0.5, 5.5)
