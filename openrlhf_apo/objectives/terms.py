"""What the driver decides about an optimizer step: the objective as numbers per sample."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .token_base import TokenLoss


@dataclass(eq=False)
class Terms:
    """The objective of one optimizer step, or of some of its samples, as a sum over samples that knows of no other:

        L = sum_i [ log_prob_i sum_t log pi(y_it) + weight_i sum_t f_it loss(y_it, advantage_it)
                    + kl_i sum_t KL_it(pi || pi_ref) - entropy_i sum_t H_it ]

    `columns` holds those that are present, each [N] float64, by the names above; `kl_reward` = beta_i makes
    advantage_it = advantage_i - beta_i sum_{s >= t} KL_is(pi_old || pi_ref), KL in the reward as OpenRLHF has it.
    """

    columns: dict[str, Tensor]
    loss: "TokenLoss | None" = None  # of the columns weight and advantage
    token_weights: list[list[float]] | None = None  # f_it of each sample; 1 when None
    metrics: dict[str, Any] = field(default_factory=dict)  # for the driver

    @property
    def needs_reference(self) -> bool:
        return "kl" in self.columns or "kl_reward" in self.columns

    def take(self, indices: list[int], real: list[bool] | None = None) -> "Terms":
        """The terms of these samples, in this order. `real`: False for a ghost, a repeated sample that counts for
        nothing; it makes a column `real`, 1 or 0."""
        columns = {name: values[indices] for name, values in self.columns.items()}
        if real is not None:
            counts = torch.tensor(real, dtype=torch.float64)
            columns = {name: values * counts for name, values in columns.items()} | {"real": counts}
        weights = self.token_weights and [self.token_weights[i] for i in indices]
        return Terms(columns, self.loss, weights)

    def column(self, name: str, like: Tensor) -> Tensor:
        """[N, 1], in the dtype and on the device of `like`, to weigh samples."""
        return self.columns[name].to(like)[:, None]
