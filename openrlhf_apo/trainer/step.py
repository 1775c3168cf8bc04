"""One optimizer step: what the driver knows of it, and what the ranks report of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from openrlhf_apo.trainer.layout import Layout
from openrlhf_apo.trainer.samples import Sample


@dataclass(frozen=True, eq=False)
class Step:
    """The whole groups of one optimizer step. G groups of P samples; N = G * P, in group order."""

    index: int  # of the step's samples within the rollout
    update: int  # optimizer steps taken in this rollout so far, over all epochs
    rollout: int  # from 0
    groups: list[list[Sample]]
    rewards: Tensor  # [G, P] float64, shaped by length penalties
    lengths: Tensor  # [G, P] float64, response tokens that the policy chose

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]


@dataclass(eq=False)
class Report:
    """What the training forward of an optimizer step told, of one rank's samples or of all."""

    log_prob_sums: list[float]  # [N], sum_t log pi of each sample before the update, nats
    log_ratio_sums: list[float]  # [N], the same minus that under pi_old; 0 for an objective that needs no pi_old
    grad_norm: float  # before clipping
    lr: float
    loss: float
    # Over the policy's response tokens: mismatch, of the fresh ones; what was measured: kl, entropy, ...
    token_sums: dict[str, float]
    num_tokens: float
    filtered_sums: list[float] = field(default_factory=list)  # [N], tokens outside of a correction's gate

    @property
    def token_means(self) -> dict[str, float]:
        return {name: total / self.num_tokens for name, total in self.token_sums.items()}

    @classmethod
    def merge(cls, reports: list["Report"], layout: Layout, num_samples: int) -> "Report":
        """All ranks' reports as one, with samples in the step's order."""
        return cls(
            log_prob_sums=layout.merge([report.log_prob_sums for report in reports], num_samples),
            log_ratio_sums=layout.merge([report.log_ratio_sums for report in reports], num_samples),
            grad_norm=reports[0].grad_norm,
            lr=reports[0].lr,
            loss=sum(report.loss for report in reports),
            token_sums={name: sum(r.token_sums[name] for r in reports) for name in reports[0].token_sums},
            num_tokens=sum(report.num_tokens for report in reports),
            filtered_sums=layout.merge([report.filtered_sums for report in reports], num_samples),
        )


def per_group(values: list[float], like: Tensor) -> Tensor:
    """One number per sample, in group order -> [G, P] float64."""
    return torch.tensor(values, dtype=torch.float64).view_as(like)
