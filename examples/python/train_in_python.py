"""Train the tiny model from Python, on a reward of your own: answers that end with the right number.

python -m openrlhf_apo.data.tiny --out .cache/tiny
python examples/python/train_in_python.py
"""

import json
from pathlib import Path

from openrlhf_apo import train

rows = [json.loads(line) for line in Path(".cache/tiny/train.jsonl").read_text().splitlines()]


def reward(prompt: str, response: str, label: str) -> float:
    return float(f"boxed{{{label}}}" in response)


metrics = train(
    ".cache/tiny/model",
    rows[:640],
    reward,
    output="runs/from_python",
    loss="apo",
    rollout={"batch_size": 32, "max_new_tokens": 24},
    data={"apply_chat_template": True, "max_len": 64},
    train={"batch_size": 128},
    actor={"adam.lr": 4e-4, "lr_scheduler": "constant_with_warmup"},
)
print(f"reward {metrics[0]['reward_mean']:.3f} -> {metrics[-1]['reward_mean']:.3f}")
