"""An optimizer step as the driver hands it to the ranks: numbers per sample."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .correction import RolloutCorrection

if TYPE_CHECKING:
    from .token_base import TokenLoss


@dataclass(eq=False)
class Terms:
    """The objective of one optimizer step, or of some of its samples: a sum to which each sample adds its own part.

        L = sum_i [ log_prob_i sum_t log pi(y_it) + weight_i sum_t f_it loss(y_it, advantage_it)
                    + kl_i sum_t KL_it(pi || pi_ref) - entropy_i sum_t H_it ]

    `columns` holds the numbers by these names, each [N] float64; a part without its column is not there. The column
    `kl_reward` = beta_i puts KL into the reward, as OpenRLHF has it: advantage_it = advantage_i - beta_i
    sum_{s >= t} KL_is(pi_old || pi_ref).

    With a correction for the engine (correction.py) log_prob_i is multiplied by the gate of the answer, and each f_it
    by the correction's weight. A loss whose ratio is one of whole answers has pi_rollout for pi_old instead.
    """

    columns: dict[str, Tensor]
    loss: "TokenLoss | None" = None  # of the columns weight and advantage
    token_weights: list[list[float]] | None = None  # f_it of each sample; 1 when None
    metrics: dict[str, Any] = field(default_factory=dict)  # for the driver
    correction: RolloutCorrection | None = None
    unbiased_kl: bool = False  # of the column kl

    @property
    def needs_reference(self) -> bool:
        return "kl" in self.columns or "kl_reward" in self.columns

    @property
    def needs_old(self) -> bool:
        """Whether log-probs under pi_old are part of the sum."""
        return self.loss is not None or self.correction is not None or self.unbiased_kl

    @property
    def gate(self) -> RolloutCorrection | None:
        """The correction; None also for a loss that has pi_rollout for pi_old instead."""
        return None if self.loss is not None and self.loss.ratio_of_answers else self.correction

    def take(self, indices: list[int], real: list[bool] | None = None) -> "Terms":
        """The terms of these samples, in this order. real: False marks a ghost, a repeated sample that must not count.
        All its numbers become 0; the column `real` says so, 1 or 0."""
        columns = {name: values[indices] for name, values in self.columns.items()}
        if real is not None:
            counts = torch.tensor(real, dtype=torch.float64)
            columns = {name: values * counts for name, values in columns.items()} | {"real": counts}
        weights = self.token_weights and [self.token_weights[i] for i in indices]
        return Terms(columns, self.loss, weights, correction=self.correction, unbiased_kl=self.unbiased_kl)

    def column(self, name: str, like: Tensor) -> Tensor:
        """A column as [N, 1], with the dtype and the device of `like`."""
        return self.columns[name].to(like)[:, None]
