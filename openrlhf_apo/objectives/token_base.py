"""What token and sequence objectives have in common.

A token objective is a sum over tokens. A micro-batch can compute its share of the sum, if the normaliser is that of
the whole optimizer step. So the driver gives every sample its numbers, and the ranks compute

    L = sum_i w_i sum_t f_it loss(log pi_theta(y_it), log pi_old(y_it), A_i)

    w_i   1/sum_j |y_j|  ("token")    1/(N |y_i|)  ("sequence")    1/(N L_max)  ("constant")
    A_i   from whole groups, float64
    f_it  1, or a weight per token

with N the samples of the optimizer step. No micro-batch, accumulation or sharding can change this sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from openrlhf_apo.errors import LossError
from openrlhf_apo.settings import Checked

from .checks import check_groups
from .terms import Terms
from .uses import TOKEN_USES, use_of

Aggregation = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, eq=False, repr=False)
class TokenStep:
    """One optimizer step, seen from a token objective on the driver. N = G * P samples, in group order.

    A loss that reads entropies or max_length declares it (`uses=`). One that was not declared is None, and reading it
    raises LossError.
    """

    rewards: Tensor  # [G, P]
    lengths: Tensor  # [G, P], response tokens that the policy chose: all, or those of its turns
    response_ids: list[list[int]]  # these tokens, of each of the N samples
    log_ratios: Callable[[], list[Tensor]]  # log pi_theta - log pi_old per token; costs a forward
    max_length: int | None = None  # --rollout.max_new_tokens
    entropies: Tensor | None = None  # [G, P], mean token entropy under pi_old, nats

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None and (use := use_of(name, TOKEN_USES)) is not None:
            raise LossError(f"step.{name} was not declared: add {use!r} to uses= of @token_loss")
        return value


class TokenLoss(Checked):
    """Base of the token objectives. A subclass sets `aggregation` and defines `per_token`; it may replace the rest."""

    aggregation: ClassVar[Aggregation]
    ratio_of_answers: ClassVar[bool] = False  # whether `per_token` has one ratio per answer, as GSPO

    @classmethod
    def presets(cls, max_new_tokens: int | None) -> dict[str, object]:
        """{flag: value}: the paper's values for flags that all losses share, where OpenRLHF's defaults differ."""
        return {}

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log_probs, old_log_probs [nats] and mask, [B, T], and advantages, [B, 1] or [B, T] -> (loss[B, T],
        clipped[B, T] bool). Runs on the ranks; a row may not look at another row.

        Values where mask is 0 do not count. `clipped` marks the tokens whose gradient a clip has changed.
        """
        raise NotImplementedError

    def advantages(self, rewards: Tensor) -> Tensor:
        """rewards[G, P] -> A[G, P]."""
        return group_z_score(rewards)

    def terms(self, step: TokenStep) -> Terms:
        """What the ranks add up: the columns advantage and weight, and the loss of a token. Runs on the driver."""
        return self.token_terms(step, self.advantages(step.rewards))

    def token_terms(
        self,
        step: TokenStep,
        advantages: Tensor,
        loss: "TokenLoss | None" = None,
        token_weights: list[list[float]] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> Terms:
        """Terms of advantages[G, P] with the weights of `aggregation`. loss: what the ranks use; None is this one.
        token_weights: f_it, one number per response token of each sample. metrics: for the metrics file."""
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
        """What `terms` remembers from step to step, as JSON can hold it."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def group_z_score(rewards: Tensor) -> Tensor:
    """rewards[G, P] -> (R - mean) / (std + 1e-9), float64. Exactly 0 where all rewards of a group are equal.

    std is the sample one, 1/(P-1), as in OpenRLHF, TRL and verl.
    """
    rewards = check_groups("rewards", rewards)
    varied = rewards.max(-1, keepdim=True).values > rewards.min(-1, keepdim=True).values
    z = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + 1e-9)
    return torch.where(varied, z, 0.0)
