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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from openrlhf_apo.settings import Checked

from .checks import check_groups
from .terms import Terms


@dataclass(frozen=True, eq=False)
class TokenStep:
    """One optimizer step, seen from a token objective on the driver. N = G * P samples, in group order.

    A loss that reads entropies or max_length declares it (`uses=`).
    """

    rewards: Tensor  # [G, P]
    lengths: Tensor  # [G, P], response tokens
    response_ids: list[list[int]]  # of each of the N samples
    log_ratios: Callable[[], list[Tensor]]  # log pi_theta - log pi_old per token; costs a forward
    max_length: int | None = None  # --rollout.max_new_tokens
    entropies: Tensor | None = None  # [G, P], mean token entropy under pi_old, nats


class TokenLoss(Checked):
    """Base of the token objectives; a subclass sets `aggregation` and defines `per_token`."""

    aggregation: ClassVar[Literal["token", "sequence", "constant"]]

    @classmethod
    def presets(cls, max_new_tokens: int | None) -> dict[str, object]:
        """{flag: value}: the paper's settings of flags that are not the loss's own, where OpenRLHF's are others."""
        return {}

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

    def terms(self, step: TokenStep) -> Terms:
        """What the ranks are to add up: columns advantage and weight, and the loss of a token."""
        return self.token_terms(step, self.advantages(step.rewards))

    def token_terms(
        self,
        step: TokenStep,
        advantages: Tensor,
        loss: "TokenLoss | None" = None,
        token_weights: list[list[float]] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Terms:
        """Terms of advantages[G, P] with the weights of `aggregation`. `loss`: where it is not this one itself."""
        columns = {"advantage": advantages.flatten(), "weight": self.weights(step).flatten()}
        return Terms(columns, loss or self, token_weights, metrics or {})

    def weights(self, step: TokenStep) -> Tensor:
        """w[G, P] of `aggregation`."""
        lengths = step.lengths.double()
        if self.aggregation == "token":
            return torch.full_like(lengths, 1.0 / lengths.sum().item())
        if self.aggregation == "sequence":
            return 1.0 / (lengths * lengths.numel())
        assert step.max_length is not None, 'aggregation "constant" needs uses=("max_length",)'
        return torch.full_like(lengths, 1.0 / (lengths.numel() * step.max_length))

    def state_dict(self) -> dict:
        """What a resumed run needs of this loss, JSON-able."""
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
