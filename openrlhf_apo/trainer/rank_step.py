"""A rank's share of an optimizer step: its samples' numbers, the sum that a micro-batch adds, and its report."""

from dataclasses import dataclass

import torch
from openrlhf.models.utils import compute_approx_kl
from torch import Tensor

from openrlhf_apo.objectives.token_loss import TokenLoss
from openrlhf_apo.trainer.layout import Layout
from openrlhf_apo.trainer.step import StepReport, StepTerms


@dataclass
class RankTerms:
    """StepTerms of one rank's samples, in the order they were loaded, or of some of them. Ghosts have 0 everywhere."""

    columns: dict[str, list[float]]  # those of StepTerms, and `real`: 1, or 0 for a ghost
    loss: TokenLoss | None
    token_weights: list[list[float]] | None

    @property
    def needs_reference(self) -> bool:
        return "kl" in self.columns or "kl_reward" in self.columns

    def rows(self, start: int, count: int) -> "RankTerms":
        """Those of `count` samples from `start` on: a micro-batch's."""
        part = slice(start, start + count)
        columns = {name: values[part] for name, values in self.columns.items()}
        return RankTerms(columns, self.loss, self.token_weights and self.token_weights[part])

    def column(self, name: str, like: Tensor) -> Tensor:
        """[B, 1], to weigh the samples of a micro-batch."""
        return torch.tensor(self.columns[name], dtype=torch.float64).to(like)[:, None]


@dataclass
class RankReport:
    """StepReport of one rank; the sums are over its own samples and tokens."""

    log_prob_sums: list[float]
    log_ratio_sums: list[float]
    grad_norm: float
    lr: float
    loss: float
    token_sums: dict[str, float]
    num_tokens: float


def micro_batch_loss(
    terms: RankTerms,
    log_probs: Tensor,
    mask: Tensor,
    old: Tensor,
    reference: Tensor | None,
    entropies: Tensor | None,
    kl_estimator: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What B samples add to the sum of StepTerms, and what was measured per token.

    log_probs, mask, log-probs under the old and the reference policy, entropies: [B, T], nats, log-probs 0 where mask
    is 0. The reference is needed for the columns `kl` and `kl_reward`, entropies for `entropy`.
    """
    loss, measured = log_probs.new_zeros(()), {}
    if "log_prob" in terms.columns:
        loss = loss + (terms.column("log_prob", log_probs) * log_probs).sum()
    if terms.loss is not None:
        advantages = terms.column("advantage", log_probs)  # [B, 1]
        if "kl_reward" in terms.columns:
            kl = compute_approx_kl(old, reference, kl_estimator=kl_estimator)
            to_come = (kl * mask).flip(-1).cumsum(-1).flip(-1)
            advantages = advantages - terms.column("kl_reward", log_probs) * to_come  # [B, T]
            measured["kl"] = kl
        per_token, clipped = terms.loss.per_token(log_probs, old, advantages, mask)
        weights = terms.column("weight", log_probs) * mask
        if terms.token_weights is not None:
            weights = weights * _on_response_tokens(terms.token_weights, mask)
        loss = loss + (weights * per_token).sum()
        measured |= {"clipped_fraction": clipped.to(mask), "ppo_kl": old - log_probs.detach()}
    if "kl" in terms.columns:
        kl = compute_approx_kl(log_probs, reference, kl_estimator=kl_estimator)
        loss = loss + (terms.column("kl", log_probs) * mask * kl).sum()
        measured["kl"] = kl.detach()
    if "entropy" in terms.columns:
        loss = loss - (terms.column("entropy", log_probs) * mask * entropies).sum()
        measured["entropy"] = entropies.detach()
    return loss, measured


def _on_response_tokens(values: list[list[float]], mask: Tensor) -> Tensor:
    """values of each sample's response tokens -> [B, T], 0 elsewhere."""
    placed = torch.zeros_like(mask)
    for row, where, numbers in zip(placed, mask > 0, values, strict=True):
        row[where] = torch.tensor(numbers, dtype=torch.float64).to(row)
    return placed


def rank_terms(terms: StepTerms, layout: Layout, rank: int) -> RankTerms:
    """The rank's share of a step's terms."""
    columns = {name: layout.share(values.tolist(), rank) for name, values in terms.columns.items()}
    token_weights = terms.token_weights and [terms.token_weights[i] for i in layout.flat(rank)]
    return RankTerms(columns | {"real": layout.real(rank)}, terms.loss, token_weights)


def merge_reports(reports: list[RankReport], layout: Layout, num_samples: int) -> StepReport:
    """All ranks' reports of a step as one."""

    def merged(per_rank: list[list[float]]) -> Tensor:
        return torch.tensor(layout.merge(per_rank, num_samples), dtype=torch.float64)

    num_tokens = sum(report.num_tokens for report in reports)
    return StepReport(
        log_prob_sums=merged([report.log_prob_sums for report in reports]),
        log_ratio_sums=merged([report.log_ratio_sums for report in reports]),
        grad_norm=reports[0].grad_norm,
        lr=reports[0].lr,
        loss=sum(report.loss for report in reports),
        token_means={
            name: sum(report.token_sums[name] for report in reports) / num_tokens for name in reports[0].token_sums
        },
    )
