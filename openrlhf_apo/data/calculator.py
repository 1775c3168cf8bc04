r"""Sums that are too hard for a tiny model, which may ask a calculator (examples/agents/calculator.py).

The warm-up teaches all that it takes, and no preference: to answer at once (`\boxed{1026}`, mostly a guess), to ask
(`calc(27*38)`), and to answer with what the calculator has said.
"""

import random

from openrlhf_apo.data.tasks import Task, different

NUMBERS = range(11, 100)
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
ASKS = 0.3  # share of the warm-up's first turns that ask


def calculator(seed: int) -> Task:
    rng = random.Random(seed)
    taken: set[str] = set()
    held_out = different(lambda: _row(rng), 512, taken)
    train = different(lambda: _row(rng), 8192, taken)
    warm = []
    for row in train:
        call = f"calc({row['sum']})"
        asked = {"prompt": f"{row['prompt']}<|im_end|><|assistant|>{call}<|im_end|><|user|>{row['label']}"}
        warm += [row | {"completion": call} if rng.random() < ASKS else row, row | asked]
    return Task(warm, train[:4096], held_out, shifted=[], steps=400, target=1.0)


def _row(rng: random.Random) -> dict:
    a, b, operation = rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice("+-*")
    result = str(RESULT[operation](a, b))
    return {
        "prompt": f"What is {a} {operation} {b}?",
        "completion": f"\\boxed{{{result}}}",
        "label": result,
        "datasource": "calculator",
        "sum": f"{a}{operation}{b}",
    }
