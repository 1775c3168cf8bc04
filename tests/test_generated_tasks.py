"""The generated tasks: what their rows promise, and that their rewards are exact."""

from itertools import combinations_with_replacement

import pytest

from openrlhf_apo.data import tiny
from openrlhf_apo.data.coins import AMOUNTS, LARGER, shortest
from openrlhf_apo.rewards import coins as coins_reward
from openrlhf_apo.rewards import sorting as sorting_reward


@pytest.fixture(scope="module", params=["coins", "sorting"])
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


def test_training_keeps_to_its_range_of_numbers():
    coins, sorting = tiny.coins(3), tiny.sorting(3)
    assert {row["label"]["amount"] for row in coins.train + coins.held_out} == set(AMOUNTS)
    assert {row["label"]["amount"] for row in coins.shifted} == set(LARGER)
    assert {row["label"]["amount"] for row in coins.warm} == set(AMOUNTS) | set(LARGER)
    assert max(int(row["label"].split()[-1]) for row in sorting.train + sorting.held_out) == 59
    assert min(int(row["label"].split()[0]) for row in sorting.shifted) == 50


def test_every_completion_of_the_warm_up_is_right():
    for row in tiny.coins(3).warm[:500]:
        assert 0 < reward(coins_reward, row["completion"], row["label"]) <= 1
    for row in tiny.sorting(3).warm[:500]:
        assert reward(sorting_reward, row["completion"], row["label"]) == 1


def test_the_fewest_coins_are_the_fewest():
    for amount, kinds in [(30, (1, 15, 20, 25)), (47, (1, 5, 10, 25)), (12, (1, 4, 6, 9)), (19, (1, 7, 8, 30))]:
        payments = (c for n in range(1, 20) for c in combinations_with_replacement(kinds, n) if sum(c) == amount)
        assert sorted(shortest(kinds)[amount]) == list(next(payments))


@pytest.mark.parametrize(
    "answer, worth",
    [
        ("25+20+2", 1.0),
        ("20+25+2", 1.0),
        ("25+20+1+1", 0.75),
        ("25+10+10+1+1", 0.0),  # there is no 10
        ("25+20+1", 0.0),
        ("25+20+2+0", 0.0),
        ("25 + 20 + 2", 0.0),
        ("25+20+2+", 0.0),
        ("", 0.0),
        ("٢٥+20+2", 0.0),
        ("1" * 5000, 0.0),
    ],
)
def test_worth_of_a_payment(answer, worth):
    label = {"amount": 47, "coins": [1, 2, 20, 25], "fewest": 3}
    assert reward(coins_reward, answer, label) == worth


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
