"""`--reward openrlhf_apo/rewards/sorting.py`: the reward of data/sorting.py."""


def sorted_share(answer: str, right: str) -> float:
    """The share of the right numbers that the answer begins with; an answer that goes on after all of them has 0."""
    numbers, wanted = answer.split(" "), right.split(" ")
    if len(numbers) > len(wanted):
        return 0.0
    correct = 0
    while correct < len(numbers) and numbers[correct] == wanted[correct]:
        correct += 1
    return correct / len(wanted)


def reward_func(queries, prompts, labels, **kwargs):
    answer = queries[0][len(prompts[0]) :].removesuffix("<|im_end|>")
    return {"rewards": [sorted_share(answer, labels[0])]}
