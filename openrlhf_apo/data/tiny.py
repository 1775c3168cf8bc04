r"""The smallest thing that learns: generated arithmetic and a Qwen3-shaped model that is right almost half the time.

    python -m openrlhf_apo.data.tiny --out runs/tiny --seed 0

writes train.jsonl, eval.jsonl and model/. A question is a sum ("What is 27 + 38?") or a short story ("Tom has 12
pens and buys 7 more. How many pens?"); the model has learned to answer `12+7=\boxed{19}`, not always rightly.
`--task pairs`, `sorting` and `calculator` make other tasks (pairs.py, sorting.py, calculator.py), the first two with
shifted.jsonl beside eval.jsonl.
"""

import argparse
import logging
import random
from pathlib import Path

from openrlhf_apo.data.calculator import calculator
from openrlhf_apo.data.pairs import pairs
from openrlhf_apo.data.sorting import sorting
from openrlhf_apo.data.tasks import Task
from openrlhf_apo.data.warm_model import WarmModel, build_warm_model

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Zoe", "Max", "Eva")
ITEMS = ("apples", "pens", "books", "coins", "cards", "shells")
STORIES = {
    "+": (
        "{name} has {a} {items} and buys {b} more. How many {items}?",
        "{name} has {a} {items} and finds {b}. How many in all?",
        "There are {a} {items} here and {b} there. How many {items}?",
    ),
    "-": (
        "{name} has {a} {items} and gives away {b}. How many are left?",
        "{name} had {a} {items} and lost {b}. How many {items} now?",
        "Of {a} {items}, {name} sells {b}. How many remain?",
    ),
    "*": ("{name} has {a} bags of {b} {items}. How many {items}?",),
}
SHARE = {"+": 0.45, "-": 0.45, "*": 0.1}
RESULT = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
FACTS = {
    "+": [(a, b) for a in range(1, 40) for b in range(1, 40)],
    "-": [(a, b) for a in range(2, 40) for b in range(1, a)],
    "*": [(a, b) for a in range(2, 10) for b in range(2, 10)],
}


def arithmetic_rows(n_train: int, n_eval: int, seed: int) -> tuple[list[dict], list[dict]]:
    r"""(train, eval) rows of `prompt`, `completion` (`12+7=\boxed{19}`), `label` and `datasource`.

    A tenth of the facts is for eval alone: a pair of numbers and its operation that is seen there is seen in training
    neither in another story nor the other way round (7 + 12). A prompt may come twice; 40 % are stories.
    """
    rng = random.Random(seed)
    pairs = sorted({(op, *sorted(fact)) for op, facts in FACTS.items() for fact in facts})
    held_out = set(rng.sample(pairs, len(pairs) // 10))

    def draw(n, for_eval):
        facts = {
            op: [fact for fact in facts if ((op, *sorted(fact)) in held_out) == for_eval]
            for op, facts in FACTS.items()
        }
        operations = rng.choices(list(SHARE), list(SHARE.values()), k=n)
        return [_row(rng, op, *rng.choice(facts[op])) for op in operations]

    return draw(n_train, False), draw(n_eval, True)


def _row(rng, op, a, b):
    if rng.random() < 0.4:
        prompt = rng.choice(STORIES[op]).format(a=a, b=b, name=rng.choice(NAMES), items=rng.choice(ITEMS))
    else:
        prompt = f"What is {a} {op} {b}?"
    answer = str(RESULT[op](a, b))
    completion = f"{a}{op}{b}=\\boxed{{{answer}}}"
    return {"prompt": prompt, "completion": completion, "label": answer, "datasource": "arithmetic"}


def arithmetic(seed: int) -> Task:
    """The warm-up ends at about step 600, when 0.35 of sampled completions are right."""
    warm, held_out = arithmetic_rows(40_000, 512, seed)
    train = list({row["prompt"]: row for row in warm}.values())[:4096]
    return Task(warm, train, held_out, shifted=[], steps=1500, target=0.35)


TASKS = {make.__name__: make for make in (arithmetic, calculator, pairs, sorting)}


def build_tiny(out_dir, task: Task, seed: int = 0) -> WarmModel:
    """Make the task's data and model, or find them made. About 0.9 M parameters; arithmetic takes 75 s on one
    core."""
    return build_warm_model(
        out_dir,
        task.warm,
        task.train,
        task.held_out,
        task.shifted,
        vocab_size=512,
        hidden=128,
        layers=4,
        steps=task.steps,
        target=task.target,
        seed=seed,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make a generated task and a tiny model warmed up on it.")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build_tiny(args.out, TASKS[args.task](args.seed), args.seed)


if __name__ == "__main__":
    main()
