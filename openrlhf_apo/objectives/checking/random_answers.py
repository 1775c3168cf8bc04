"""Random answers on which to examine a token loss."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from openrlhf_apo.objectives.token_base import TokenStep

from .random_groups import Rewards, random_batch

LONGEST = 4096  # tokens


@dataclass(frozen=True, eq=False)
class Answers:
    """G groups of P answers, N = G * P in group order; a row has one entry per token of its answer."""

    rewards: Tensor  # [G, P]
    entropies: Tensor  # [G, P], mean token entropy under pi_old, nats
    ids: list[list[int]]  # [N] rows
    old: list[Tensor]  # [N] rows, log pi_old, nats
    new: list[Tensor]  # [N] rows, log pi_theta, nats
    max_length: int  # tokens, that an answer may have

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    def step(self, uses: frozenset[str]) -> TokenStep:
        """The step as the trainer hands it to a loss that declares `uses`."""
        return TokenStep(
            rewards=self.rewards.clone(),
            lengths=torch.tensor(self.lengths, dtype=torch.float64).view_as(self.rewards),
            response_ids=[list(row) for row in self.ids],
            log_ratios=lambda: [new - old for new, old in zip(self.new, self.old, strict=True)],
            max_length=self.max_length if "max_length" in uses else None,
            entropies=self.entropies.clone() if "entropy" in uses else None,
        )

    def reordered(self, order: list[int]) -> "Answers":
        """With the answers of every group in another order."""
        size = self.rewards.shape[1]
        rows = [start + i for start in range(0, len(self.ids), size) for i in order]
        return replace(
            self,
            rewards=self.rewards[:, order],
            entropies=self.entropies[:, order],
            ids=[self.ids[i] for i in rows],
            old=[self.old[i] for i in rows],
            new=[self.new[i] for i in rows],
        )


def random_answers(
    shape: tuple[int, int],
    rewards: Rewards,
    log_ratio: Literal["zero", "moderate", "large"] = "moderate",
    lengths: Literal["usual", "extreme"] = "usual",
    seed: int = 0,
) -> Answers:
    """Groups of `shape` (G, P), float64, the same at every call with the same seed; rewards as `random_batch`.

    log_ratio, per token: 0, some 0.3 nats, or +-50 nats. lengths: 1 to 9 tokens, or 1 and LONGEST.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = shape[0] * shape[1]
    numbers, max_length = torch.randint(1, 10, (answers,), generator=generator).tolist(), 10
    if lengths == "extreme":
        numbers, max_length = [1 if i % 2 else LONGEST for i in range(answers)], LONGEST
    noise, surprise = torch.randn(2, sum(numbers), generator=generator, dtype=torch.float64)
    x = {"zero": 0 * noise, "moderate": (0.3 * noise).clamp(-0.9, 0.9), "large": 50.0 * noise.sign()}[log_ratio]
    old = -1 - surprise.abs() - (50.0 if log_ratio == "large" else 0.0)  # log-probs stay below 0
    ids = torch.randint(0, 3, (sum(numbers),), generator=generator)  # few tokens, so that answers share some
    entropies = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2
    values = random_batch(shape, rewards).rewards
    old_rows, new_rows = (list(tensor.split(numbers)) for tensor in (old, old + x))
    return Answers(values, entropies, [row.tolist() for row in ids.split(numbers)], old_rows, new_rows, max_length)
