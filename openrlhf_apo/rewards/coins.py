"""`--reward openrlhf_apo/rewards/coins.py`: the reward of data/coins.py."""

import re


def worth(answer: str, amount: int, coins: list[int], fewest: int) -> float:
    """Fewest coins / coins used of `25+10+10+1+1`, where they are among `coins` and make the amount; else 0."""
    if not re.fullmatch(r"\d{1,4}(\+\d{1,4}){0,99}", answer, re.ASCII):
        return 0.0
    paid = [int(number) for number in answer.split("+")]
    return fewest / len(paid) if sum(paid) == amount and set(paid) <= set(coins) else 0.0


def reward_func(queries, prompts, labels, **kwargs):
    answer = queries[0][len(prompts[0]) :].removesuffix("<|im_end|>")
    return {"rewards": [worth(answer, **labels[0])]}
