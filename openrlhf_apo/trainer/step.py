"""One optimizer step: what the driver knows of it, what it tells the ranks, and what they report."""

from dataclasses import dataclass, field

from torch import Tensor

from openrlhf_apo.objectives.token_loss import TokenLoss
from openrlhf_apo.trainer.samples import Sample


@dataclass(frozen=True, eq=False)
class Step:
    """The whole groups of one optimizer step. G groups of P samples; N = G * P, in group order."""

    index: int  # of the step's samples within the rollout
    update: int  # optimizer steps taken in this rollout so far, over all epochs
    rollout: int  # from 0
    groups: list[list[Sample]]
    rewards: Tensor  # [G, P] float64, shaped by length penalties
    lengths: Tensor  # [G, P] float64, response tokens

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]


@dataclass(eq=False)
class StepTerms:
    """The objective of one optimizer step as numbers per sample, so that ranks need to know of no other sample:

        L = sum_i [ log_prob_i sum_t log pi(y_it) + weight_i sum_t f_it loss(y_it, advantage_it)
                    + kl_i sum_t KL_it(pi || pi_ref) - entropy_i sum_t H_it ]

    `columns` holds those that are present, each [N] float64, by the names above; `kl_reward` = beta_i makes
    advantage_it = advantage_i - beta_i sum_{s >= t} KL_is(pi_old || pi_ref), KL in the reward as OpenRLHF has it.
    """

    columns: dict[str, Tensor]
    loss: TokenLoss | None = None  # of the columns weight and advantage
    token_weights: list[list[float]] | None = None  # f_it of each sample; 1 when None


@dataclass
class StepReport:
    """What one optimizer step tells: the training forward is the only one it made."""

    log_prob_sums: Tensor  # [N] float64, sum_t log pi of each sample before the update, nats
    log_ratio_sums: Tensor  # [N] float64, the same minus that under pi_old; 0 for an objective that needs no pi_old
    grad_norm: float  # before clipping
    lr: float
    loss: float
    token_means: dict[str, float] = field(default_factory=dict)  # mismatch, and what was measured: kl, entropy, ...
