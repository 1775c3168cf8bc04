"""Random groups on which to examine a group loss."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from openrlhf_apo.objectives.apo import AlphaDivergenceLoss
from openrlhf_apo.objectives.group_base import GroupContext
from openrlhf_apo.objectives.target import GroupTargetBuilder

Rewards = Literal["equal", "binary", "graded"]


@dataclass(frozen=True, eq=False)
class Batch:
    log_ratio: Tensor  # [G, P], nats
    rewards: Tensor  # [G, P]
    context: GroupContext

    def select(self, groups: slice = slice(None), answers: slice | Tensor = slice(None)) -> "Batch":
        """The batch of some groups, or with the answers of every group reordered."""
        log_ratio, rewards, log_q, lengths = (
            values[groups][:, answers]
            for values in (self.log_ratio, self.rewards, self.context.log_q, self.context.lengths)
        )
        return Batch(log_ratio, rewards, replace(self.context, log_q=log_q, lengths=lengths))


def random_batch(
    shape: tuple[int, int],
    rewards: Rewards,
    log_ratio: Literal["anchor", "moderate", "large"] = "moderate",
    lengths: Literal["usual", "extreme"] = "usual",
    alpha: float | Tensor = 0.6,
) -> Batch:
    """Groups of `shape` (G, P), float64, the same at every call; two decimals, so that an error can show them.

    rewards: "equal" is all 0 in one group and all 1 in the next; "binary" has a 0 and a 1 in every group. log_ratio:
    0, standard normal, or +-50 nats. lengths: 2 to some 300, or 1 and 100,000.
    """
    generator = torch.Generator().manual_seed(0)
    first, second, third = (
        torch.randn(shape, generator=generator, dtype=torch.float64).round(decimals=2) for _ in range(3)
    )
    if rewards == "equal":
        first = (torch.arange(shape[0]) % 2).double()[:, None].repeat(1, shape[1])
    elif rewards == "binary":
        first = (first > 0).double()
        first[:, 0], first[:, 1] = 0.0, 1.0
    x = {"anchor": torch.zeros_like(second), "moderate": second, "large": 50.0 * second.sign()}[log_ratio]
    usual = (100 * third.abs()).ceil() + 2
    tokens = usual if lengths == "usual" else torch.where(third > 0, 1.0, 100_000.0).double()
    return Batch(x, first, GroupContext(GroupTargetBuilder()(first), tokens, alpha, AlphaDivergenceLoss.tau_anc))
