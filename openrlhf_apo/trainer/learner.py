"""One rank's share of an optimizer step: log-probs, and the sum over its samples forward and backward.

Runs inside a Ray actor, but needs only torch.distributed, OpenRLHF's Actor and its DeepSpeed engine.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from openrlhf.models import Actor
from openrlhf.models.utils import compute_approx_kl
from openrlhf.utils.utils import zero_pad_sequences
from torch import Tensor

from openrlhf_apo.objectives.token_loss import TokenLoss
from openrlhf_apo.trainer.anchor_weights import AnchorWeights
from openrlhf_apo.trainer.layout import Layout
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.step import StepReport, StepTerms


@dataclass
class MicroBatch:
    """B right-padded samples of T tokens."""

    sequences: Tensor  # [B, T] prompt + response token ids
    attention_mask: Tensor  # [B, T]
    action_mask: Tensor  # [B, T-1], 1 where the next token is a response token
    rollout_log_probs: Tensor  # [B, T-1] float32, 0 outside the response

    @classmethod
    def of(cls, samples: list[Sample], pad_token_id: int) -> "MicroBatch":
        def padded(rows, dtype, value=0):
            return zero_pad_sequences([torch.tensor(row, dtype=dtype) for row in rows], "right", value, stack=True)

        prompts = [len(s.prompt_ids) for s in samples]
        return cls(
            sequences=padded([s.prompt_ids + s.response_ids for s in samples], torch.long, pad_token_id),
            attention_mask=padded([[1] * s.total_length for s in samples], torch.long),
            action_mask=padded(
                [[0] * (p - 1) + [1] * len(s.response_ids) for p, s in zip(prompts, samples, strict=True)],
                torch.long,
            ),
            rollout_log_probs=padded(
                [[0.0] * (p - 1) + s.rollout_log_probs for p, s in zip(prompts, samples, strict=True)], torch.float32
            ),
        )

    def to(self, device) -> "MicroBatch":
        return MicroBatch(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass
class RankTerms:
    """StepTerms of one rank's samples, in the order they were loaded; ghosts have 0 everywhere."""

    columns: dict[str, list[float]]  # those of StepTerms, and `real`: 1, or 0 for a ghost
    loss: TokenLoss | None
    token_weights: list[list[float]] | None

    def column(self, name: str, rows: slice, like: Tensor) -> Tensor:
        """[B, 1], to weigh the samples of a micro-batch."""
        return torch.tensor(self.columns[name][rows], dtype=torch.float64).to(like)[:, None]


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


class Learner:
    """Holds this rank's micro-batches of a rollout. All ranks make the same calls with equally many micro-batches."""

    def __init__(
        self,
        strategy,
        actor: Actor,
        scheduler,
        pad_token_id: int,
        *,
        anchor: AnchorWeights | None = None,
        reference: Actor | None = None,
        kl_estimator: str = "k3",
    ):
        self.strategy, self.actor, self.scheduler, self.pad_token_id = strategy, actor, scheduler, pad_token_id
        self.anchor, self.reference, self.kl_estimator = anchor, reference, kl_estimator
        self.dp_size = dist.get_world_size(group=strategy.ds_device_mesh["dp"].get_group())
        self.steps: list[list[MicroBatch]] = []
        self.old: dict[tuple[int, int], Tensor] = {}  # (step, micro-batch) -> log π_old [B, T-1]
        self.reference_log_probs: dict[tuple[int, int], Tensor] = {}

    def load_steps(self, steps: list[list[list[Sample]]]) -> None:
        """steps[step][micro-batch] = samples. Replaces the rollout before."""
        self.steps = [[MicroBatch.of(samples, self.pad_token_id) for samples in step] for step in steps]
        self.old, self.reference_log_probs = {}, {}

    @torch.no_grad()
    def log_prob_sums(self, step: int, weights: str) -> list[float]:
        """Σ_t log π of this rank's samples of the step, in the order they were loaded, nats."""
        model = self.anchor.model if weights == "anchor" else self.actor
        model.eval()
        sums: list[float] = []
        for batch in self.steps[step]:
            sums += self._forward(model, batch)[0].double().sum(-1).tolist()
        return sums

    @torch.no_grad()
    def record_old(self, step: int, entropy: bool) -> list[float]:
        """Keep log π_old; with `entropy`, the mean token entropy of each sample."""
        self.actor.eval()
        means: list[float] = []
        for k, batch in enumerate(self.steps[step]):
            self.old[step, k], entropies = self._forward(self.actor, batch, entropy)
            if entropy:
                mask = batch.action_mask.to(entropies.device)
                means += ((entropies * mask).double().sum(-1) / mask.sum(-1)).tolist()
        return means

    @torch.no_grad()
    def log_ratios(self, step: int) -> list[list[float]]:
        """log π_θ − log π_old of each token of each sample."""
        self.actor.eval()
        ratios: list[list[float]] = []
        for k, batch in enumerate(self.steps[step]):
            if (step, k) in self.old:
                difference = (self._forward(self.actor, batch)[0] - self.old[step, k]).cpu()
            else:
                difference = torch.zeros_like(batch.rollout_log_probs)
            ratios += [row[mask > 0].tolist() for row, mask in zip(difference, batch.action_mask, strict=True)]
        return ratios

    def apply(self, step: int, terms: RankTerms) -> RankReport:
        """Gradient of the sum over all ranks' samples, then one optimizer step."""
        self.actor.train()
        sums: list[float] = []
        ratio_sums: list[float] = []
        token_sums: dict[str, float] = defaultdict(float)
        total_loss, num_tokens = 0.0, 0.0
        for k, batch in enumerate(self.steps[step]):
            rows = slice(len(sums), len(sums) + len(batch.sequences))
            log_probs, entropies = self._forward(self.actor, batch, "entropy" in terms.columns)  # [B, T-1]
            detached = log_probs.detach()
            mask = batch.action_mask.to(log_probs)
            tokens = {"mismatch": (detached - batch.rollout_log_probs.to(detached)).abs()}
            loss = log_probs.new_zeros(())
            if "log_prob" in terms.columns:
                loss = loss + (terms.column("log_prob", rows, log_probs) * log_probs).sum()
            if terms.loss is not None:
                old = self.old.setdefault((step, k), detached)
                per_token, clipped = terms.loss.per_token(
                    log_probs, old, self._advantages(step, k, batch, terms, rows, old, tokens), mask
                )
                weights = terms.column("weight", rows, log_probs) * mask
                if terms.token_weights is not None:
                    weights = weights * _on_response_tokens(terms.token_weights[rows], batch.action_mask).to(weights)
                loss = loss + (weights * per_token).sum()
                tokens |= {"clipped_fraction": clipped.to(mask), "ppo_kl": old - detached}
                ratio_sums += (detached - old).double().sum(-1).tolist()
            else:
                ratio_sums += [0.0] * len(batch.sequences)
            if "kl" in terms.columns:
                kl = compute_approx_kl(log_probs, self._reference(step, k, batch), kl_estimator=self.kl_estimator)
                loss = loss + (terms.column("kl", rows, log_probs) * mask * kl).sum()
                tokens["kl"] = kl.detach()
            if "entropy" in terms.columns:
                loss = loss - (terms.column("entropy", rows, log_probs) * mask * entropies).sum()
                tokens["entropy"] = entropies.detach()
            # DeepSpeed averages over the data-parallel ranks; the objective is a sum over them.
            self.strategy.backward(loss * self.dp_size, self.actor, None)
            total_loss += loss.item()
            sums += detached.double().sum(-1).tolist()
            counted = mask * terms.column("real", rows, mask)
            num_tokens += counted.sum().item()
            for name, values in tokens.items():
                token_sums[name] += (values * counted).sum().item()
        self.strategy.optimizer_step(None, self.actor, self.scheduler, name="actor")
        return RankReport(
            log_prob_sums=sums,
            log_ratio_sums=ratio_sums,
            grad_norm=self.strategy.get_grad_norm(self.actor),
            lr=self.scheduler.get_last_lr()[0],
            loss=total_loss,
            token_sums=dict(token_sums),
            num_tokens=num_tokens,
        )

    def _advantages(self, step, k, batch, terms: RankTerms, rows: slice, old: Tensor, tokens: dict) -> Tensor:
        """[B, 1]; with KL in the reward [B, T-1], what is still to come of it from each token on."""
        advantages = terms.column("advantage", rows, old)
        if "kl_reward" not in terms.columns:
            return advantages
        kl = compute_approx_kl(old, self._reference(step, k, batch), kl_estimator=self.kl_estimator)
        tokens["kl"] = kl
        kl = kl * batch.action_mask.to(kl)
        return advantages - terms.column("kl_reward", rows, old) * kl.flip(-1).cumsum(-1).flip(-1)

    def _reference(self, step: int, k: int, batch: MicroBatch) -> Tensor:
        if (step, k) not in self.reference_log_probs:
            self.reference.eval()
            with torch.no_grad():
                self.reference_log_probs[step, k] = self._forward(self.reference, batch)[0]
        return self.reference_log_probs[step, k]

    def _forward(self, model: Actor, batch: MicroBatch, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """(log-probs, entropies or None), [B, T-1]; log-probs are 0 outside the response."""
        batch = batch.to(torch.cuda.current_device())
        log_probs, output = model(
            batch.sequences,
            batch.action_mask,
            batch.attention_mask,
            return_output=True,
            ring_attn_group=self.strategy.ring_attn_group,
            return_entropy=entropy,
        )
        return log_probs, output.entropy if entropy else None


def _on_response_tokens(values: list[list[float]], action_mask: Tensor) -> Tensor:
    """values of each sample's response tokens -> [B, T-1], 0 elsewhere."""
    placed = torch.zeros(action_mask.shape, dtype=torch.float64)
    for row, mask, numbers in zip(placed, action_mask, values, strict=True):
        row[mask > 0] = torch.tensor(numbers, dtype=torch.float64)
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
