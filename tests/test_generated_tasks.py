"""The generated tasks: what their rows promise, and that their rewards are exact."""

import re

import pytest

from openrlhf_apo.data import tiny
from openrlhf_apo.rewards import pairs as pairs_reward
from openrlhf_apo.rewards import sorting as sorting_reward


@pytest.fixture(scope="module", params=["pairs", "sorting"])
def task(request):
    return tiny.TASKS[request.param](seed=3)


def prompts(rows):
    return {row["prompt"] for row in rows}


def test_held_out_and_shifted_prompts_are_seen_nowhere_else(task):
    seen = prompts(task.warm) | prompts(task.train)
    assert seen.isdisjoint(prompts(task.held_out) | prompts(task.shifted))
    assert prompts(task.held_out).isdisjoint(prompts(task.shifted))
    assert len(prompts(task.held_out)) == 1024 and len(prompts(task.shifted)) == 512
    assert prompts(task.train) < prompts(task.warm) and len(task.train) == 4096


def test_training_keeps_to_its_range_of_numbers(task):
    for rows, numbers in ((task.train + task.held_out, range(10, 60)), (task.shifted, range(50, 100))):
        seen = {int(number) for row in rows for number in re.findall(r"\d+", row["prompt"].split(",")[0])}
        assert seen == set(numbers)


def test_every_completion_of_the_warm_up_is_right():
    worths = [reward(pairs_reward, row["completion"], row["label"]) for row in tiny.pairs(3).warm[:2000]]
    assert min(worths) > 0 and sum(worths) / 2000 == pytest.approx(0.55, abs=0.02)
    assert worths.count(1) / 2000 == pytest.approx(0.105, abs=0.02)  # the best pair is rare
    for row in tiny.sorting(3).warm[:500]:
        assert reward(sorting_reward, row["completion"], row["label"]) == 1


@pytest.mark.parametrize(
    "answer, worth",
    [
        ("30+40", 1.0),
        ("40+30", 1.0),
        ("20+40", 5 / 6),
        ("10+20", 1 / 6),
        ("10+40", 4 / 6),  # as good as 20+30
        ("40+50", 0.0),  # above the limit
        ("30+30", 0.0),  # there is one 30
        ("30+41", 0.0),
        ("30", 0.0),
        ("30 + 40", 0.0),
        ("10+20+30", 0.0),
        ("", 0.0),
        ("٣٠+40", 0.0),
        ("1" * 5000 + "+1", 0.0),
    ],
)
def test_worth_of_a_pair(answer, worth):
    # The allowed sums are 30, 40, 50, 50, 60, 70.
    label = {"numbers": [10, 20, 30, 40, 99], "limit": 70}
    assert reward(pairs_reward, answer, label) == pytest.approx(worth)


@pytest.mark.parametrize(
    "answer, share",
    [
        ("12 17 25 41", 1.0),
        ("12 17 41 25", 0.5),
        ("12 17", 0.5),
        ("17 12 25 41", 0.0),
        ("12 17 25 41 41", 0.0),
        ("12  17 25", 0.25),
        ("", 0.0),
    ],
)
def test_share_of_a_sorted_row(answer, share):
    assert reward(sorting_reward, answer, "12 17 25 41") == share


def reward(module, answer, label):
    """As the trainer asks: of an answer that ended, or was cut off."""
    ended, cut = (
        module.reward_func(queries=["Q" + answer + end], prompts=["Q"], labels=[label])["rewards"][0]
        for end in ("<|im_end|>", "")
    )
    assert ended == cut
    return ended
