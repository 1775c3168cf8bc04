"""A bad reward is never a number: every way to go wrong stops the run, or costs its whole group when allowed."""

import time
from pathlib import Path

import pytest

from openrlhf_apo.errors import RunError
from openrlhf_apo.rewards.remote import RemoteReward
from openrlhf_apo.rewards.reward import Reward
from openrlhf_apo.rewards.verifier import MathVerifyReward
from openrlhf_apo.trainer.sample_file import group_row
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.scoring import Scorer

pytestmark = pytest.mark.filterwarnings("ignore")

REWARD = """
import time, torch

def reward_func(queries, prompts, labels, **kwargs):
    (label,) = labels
    (query,) = queries
    answers = {
        "raise": lambda: 1 / 0,
        "none": lambda: None,
        "reward none": lambda: {"rewards": None},
        "nan": lambda: {"rewards": torch.tensor([float("nan")])},
        "inf": lambda: {"rewards": [float("inf")]},
        "two": lambda: {"rewards": torch.tensor([1.0, 0.0])},
        "string": lambda: {"rewards": "high"},
        "list": lambda: [1.0],
        "hang": lambda: time.sleep(10),
        "slow": lambda: (time.sleep(0.2), {"rewards": torch.tensor([0.5])})[1],
        "good": lambda: {"rewards": torch.tensor([len(query) / 100]), "scores": torch.tensor([0.0])},
    }
    return answers[label]()
"""


def sample(group: int, label: str, response: str = "abc") -> Sample:
    return Sample(group, f"prompt {group} ", label, "", [1], [2], response, [-1.0], False)


@pytest.fixture
def reward(tmp_path) -> RemoteReward:
    path = tmp_path / "reward.py"
    path.write_text(REWARD)
    return RemoteReward([str(path)], timeout=1.0)


@pytest.mark.parametrize(
    "label, message",
    [
        ("raise", "raised ZeroDivisionError: division by zero"),
        ("none", "returned None instead of {'rewards': ...}"),
        ("reward none", "returned {'rewards': None}"),
        ("nan", "is nan"),
        ("inf", "is inf"),
        ("two", "returned 2 rewards for 1 sample"),
        ("string", "raised ValueError: could not convert string to float: 'high'"),
        ("list", "returned [1.0] instead of {'rewards': ...}"),
        ("hang", "took more than 1 s"),
        ("no such label", "raised KeyError"),
    ],
)
def test_a_bad_reward_stops_the_run_and_names_the_sample(reward, label, message):
    start = time.time()
    with pytest.raises(RunError) as error:
        Scorer(reward, max_failures=0).score([sample(0, "good"), sample(1, label, "the response")])
    assert message in str(error.value)
    assert str(error.value).endswith("; a reward failed, and --reward.max_failures is 0")
    assert "prompt 1 " in str(error.value) and "the response" in str(error.value)
    assert time.time() - start < 5


def test_the_failure_budget_drops_whole_groups_and_counts(reward):
    samples = [sample(g, "nan" if (g, i) in {(1, 0), (2, 1), (2, 2)} else "good") for g in range(4) for i in range(3)]
    scorer = Scorer(reward, max_failures=3)
    kept = scorer.score(samples)
    assert sorted({s.group_id for s in kept}) == [0, 3] and len(kept) == 6
    assert scorer.failures == 3
    assert all(s.reward == pytest.approx((len(s.prompt) + len(s.response)) / 100) for s in kept)
    with pytest.raises(RunError, match="; 4 rewards failed, and --reward.max_failures is 3$"):
        scorer.score([sample(9, "none")])


def test_the_budget_is_the_runs_own_across_a_resume(reward):
    first = Scorer(reward, max_failures=5)
    first.failures = 4
    first.reward.not_verified = 2
    second = Scorer(reward, max_failures=5)
    second.load_state_dict(first.state_dict())
    assert second.metrics() == {"reward_failures": 4, "verifier_failures": 2}


def test_waiting_for_a_free_thread_is_not_counted_as_the_samples_time(reward):
    kept = Scorer(reward, max_failures=0).score([sample(0, "slow") for _ in range(100)])  # 16 at a time: 1.4 s in all
    assert [s.reward for s in kept] == [0.5] * 100


def test_the_math_reward_works_by_path_as_in_openrlhf():
    path = Path(__file__).parents[1] / "openrlhf_apo" / "rewards" / "math_verify.py"
    scorer = Scorer(RemoteReward([str(path)], timeout=60), max_failures=0)
    kept = scorer.score([sample(0, "7", answer) for answer in (r"so \boxed{7}", "7", r"\boxed{8}")])
    assert [s.reward for s in kept] == [1.0, 0.0, 0.0]


def test_answers_that_break_the_verifier_are_wrong_and_counted():
    scorer = Scorer(MathVerifyReward(timeout=5.0), max_failures=0)
    kept = scorer.score([sample(0, "7", answer) for answer in (r"\boxed{99999999!}", r"\boxed{7}")])
    assert [s.reward for s in kept] == [0.0, 1.0]
    assert scorer.metrics() == {"reward_failures": 0, "verifier_failures": 1}


def test_math_verify_scores_in_order():
    answers = [r"so \boxed{7}", "7", r"\boxed{8}", r"\boxed{\frac{14}{2}}"]
    kept = Scorer(MathVerifyReward(timeout=10), max_failures=0).score([sample(0, "7", a) for a in answers])
    assert [s.reward for s in kept] == [1.0, 0.0, 0.0, 1.0]


def test_a_reward_sees_what_guidance_has_shown_behind_the_prompt():
    class Sees:
        not_verified = 0

        def __call__(self, answers, max_failures):
            (answer,) = answers
            assert (answer.prompt, answer.response) == ("prompt 0 First 3*4. ", "abc")
            return [Reward(1.0)]

    guided = sample(0, "good")
    guided.shown = "First 3*4. "
    assert Scorer(Sees(), 0).score([guided])[0].reward == 1.0
    assert group_row(1, [guided, sample(0, "good")])["responses"] == ["⟦First 3*4. ⟧abc", "abc"]


def test_answers_that_hang_take_no_time_from_the_others(reward):
    answers = [sample(0, "hang")] * 20 + [sample(1, "slow")] * 40
    scored = Scorer(reward, max_failures=20).score(answers)
    assert [each.label for each in scored] == ["slow"] * 40
