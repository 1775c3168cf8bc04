"""Payments with few coins: a graded reward, with several answers of different worth to each prompt.

"Pay 47 with 1, 5, 10 and 25." has many right answers, and `25+10+10+1+1` is one of the best. The reward of a right one
is the share that the fewest possible coins are of its own, else 0 (rewards/coins.py). The model has seen payments of
coins drawn at random: it adds up half-way well, and seldom pays with the fewest.
"""

import random
from functools import cache

from openrlhf_apo.data.tasks import Task, different

COINS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30)
AMOUNTS, LARGER = range(10, 60), range(60, 100)
MOST_NEEDED = 5
CHANGED, MOST = 3, 10  # coins that a payment of the warm-up has changed, and has in all


def coins(seed: int) -> Task:
    """Trained on amounts up to 59, shifted to those from 60 to 99; three coins of fourteen beside the 1."""
    rng = random.Random(seed)
    taken: set[str] = set()
    held_out = different(lambda: _row(rng, AMOUNTS, "coins"), 1024, taken)
    shifted = different(lambda: _row(rng, LARGER, "coins_shifted"), 512, taken)
    warm = different(lambda: _row(rng, range(10, 100), "coins"), 12_000, taken)
    train = [row for row in warm if row["label"]["amount"] in AMOUNTS][:4096]
    return Task(warm, train, held_out, shifted, steps=500, target=1.0)


def _row(rng: random.Random, amounts: range, datasource: str) -> dict:
    amount, kinds = rng.choice(amounts), (1, *sorted(rng.sample(COINS, 3)))
    fewest = len(shortest(kinds)[amount])
    if fewest > MOST_NEEDED:
        return _row(rng, amounts, datasource)
    return {
        "prompt": f"Pay {amount} with {', '.join(map(str, kinds[:-1]))} and {kinds[-1]}.",
        "completion": "+".join(map(str, _payment(rng, amount, kinds))),
        "label": {"amount": amount, "coins": list(kinds), "fewest": fewest},
        "datasource": datasource,
    }


@cache
def shortest(kinds: tuple[int, ...]) -> list[list[int]]:
    """A payment with the fewest coins of each amount to 99; `kinds` has a 1."""
    payments: list[list[int]] = [[]]
    for amount in range(1, 100):
        payments.append(min(([*payments[amount - kind], kind] for kind in kinds if kind <= amount), key=len))
    return payments


def _payment(rng: random.Random, amount: int, kinds: tuple[int, ...]) -> list[int]:
    """The fewest coins, of which some are changed into smaller ones, in any order."""
    paid = shortest(kinds)[amount]
    for _ in range(CHANGED):
        coin = rng.choice(paid)
        if coin > 1:
            change = rng.choice([kind for kind in kinds if kind < coin])
            kept = paid.copy()
            kept.remove(coin)
            changed = [*kept, change, *shortest(kinds)[coin - change]]
            paid = changed if len(changed) <= MOST else paid
    return rng.sample(paid, len(paid))
