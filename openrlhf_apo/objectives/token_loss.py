"""What token and sequence objectives have in common.

A token objective is a sum over tokens, so any share of it can be computed inside a micro-batch as long as its
normaliser is that of the whole optimizer step. The driver therefore hands out numbers per sample,

    L = sum_i w_i sum_t f_it loss(log pi_theta(y_it), log pi_old(y_it), A_i)

    w_i   1/sum_j |y_j|  ("token")    1/(N |y_i|)  ("sequence")    1/(N L_max)  ("constant")
    A_i   from whole groups, float64
    f_it  1, or a weight per token

and no micro-batch, accumulation or sharding can change the objective. N: samples of the optimizer step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .checks import check_groups

LOG_RATIO_LIMIT = 20.0  # nats; OpenRLHF's and verl's clamp: exp stays finite, and such a ratio is clipped anyway


@dataclass(frozen=True, eq=False)
class TokenStep:
    """One optimizer step, seen from a token objective on the driver. N = G * P samples, in group order."""

    rewards: Tensor  # [G, P]
    lengths: Tensor  # [G, P], response tokens
    max_length: int  # --rollout.max_new_tokens
    response_ids: list[list[int]]  # of each of the N samples
    entropies: Tensor | None = None  # [G, P], mean token entropy under pi_old, nats; if the loss `needs_entropy`
    log_ratios: Callable[[], list[Tensor]] | None = None  # log pi_theta - log pi_old per token; costs a forward


@dataclass(frozen=True, eq=False)
class TokenTerms:
    """What the driver decided for one optimizer step."""

    loss: "TokenLoss"
    advantages: Tensor  # [G, P]
    weights: Tensor  # [G, P], w_i
    token_weights: list[list[float]] | None = None  # f_it of each of the N samples
    metrics: dict[str, float] = field(default_factory=dict)


class TokenLoss:
    """Base of the token objectives; a subclass sets `aggregation` and defines `per_token`."""

    aggregation: ClassVar[Literal["token", "sequence", "constant"]]
    needs_entropy: ClassVar[bool] = False

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log_probs, old_log_probs, mask [B, T]; advantages [B, 1] or [B, T] -> (loss[B, T], clipped[B, T] bool).

        Values where mask is 0 do not matter. `clipped` marks tokens whose gradient a clip changed.
        """
        raise NotImplementedError

    def advantages(self, rewards: Tensor) -> Tensor:
        """rewards[G, P] -> A[G, P]."""
        return group_z_score(rewards)

    def terms(self, step: TokenStep) -> TokenTerms:
        return TokenTerms(self, self.advantages(step.rewards), self.weights(step))

    def weights(self, step: TokenStep) -> Tensor:
        """w[G, P] of `aggregation`."""
        lengths = step.lengths.double()
        if self.aggregation == "token":
            return torch.full_like(lengths, 1.0 / lengths.sum().item())
        if self.aggregation == "sequence":
            return 1.0 / (lengths * lengths.numel())
        return torch.full_like(lengths, 1.0 / (lengths.numel() * step.max_length))

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def group_z_score(rewards: Tensor) -> Tensor:
    """rewards[G, P] -> (R - mean) / (std + 1e-9), float64, with the sample standard deviation (1/(P-1)) of OpenRLHF,
    TRL and verl. Exactly 0 where all rewards of a group are equal."""
    rewards = check_groups("rewards", rewards)
    varied = rewards.max(-1, keepdim=True).values > rewards.min(-1, keepdim=True).values
    z = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-9)
    return torch.where(varied, z, 0.0)


def ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """pi_theta / pi_old of each token."""
    return (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, low, high) A), and with dual_clip c: -max(min(...), c A) where A < 0. -> (loss, clipped).

    PPO, arXiv 1707.06347, Eq. 7; dual clip, arXiv 1912.09729, Eq. 5.
    """
    plain, bounded = ratio * advantages, ratio.clamp(low, high) * advantages
    gain, clipped = torch.min(plain, bounded), bounded < plain
    if dual_clip is not None:
        floor = dual_clip * advantages
        below = (advantages < 0) & (gain < floor)
        gain, clipped = torch.where(below, floor, gain), clipped | below
    return -gain, clipped
