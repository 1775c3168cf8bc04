"""`--reward openrlhf_apo/rewards/pairs.py`: the reward of data/pairs.py."""

import re
from itertools import combinations


def worth(answer: str, numbers: list[int], limit: int) -> float:
    """Of `52+17`: the share of the allowed pairs whose sum is not above its own, if it is one of them; else 0."""
    match = re.fullmatch(r"(\d{1,4})\+(\d{1,4})", answer, re.ASCII)
    pair = sorted(map(int, match.groups())) if match else []
    allowed = [sorted(two) for two in combinations(numbers, 2) if sum(two) <= limit]
    return sum(sum(two) <= sum(pair) for two in allowed) / len(allowed) if pair in allowed else 0.0


def reward_func(queries, prompts, labels, **kwargs):
    answer = queries[0][len(prompts[0]) :].removesuffix("<|im_end|>")
    return {"rewards": [worth(answer, **labels[0])]}
