"""One rank's share of an optimizer step: log-probs, and the sum over its samples forward and backward.

Needs torch.distributed, OpenRLHF's Actor and its DeepSpeed engine, and no Ray.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from openrlhf.models import Actor
from openrlhf.utils.utils import zero_pad_sequences
from torch import Tensor

from openrlhf_apo.objectives import Terms
from openrlhf_apo.ranks.anchor_weights import AnchorWeights
from openrlhf_apo.ranks.micro_batch_loss import micro_batch_loss
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.step import Report


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

    def apply(self, step: int, terms: Terms) -> Report:
        """Gradient of the sum over all ranks' samples, then one optimizer step. `terms` and the report are those of
        this rank's samples, in the order they were loaded."""
        self.actor.train()
        log_prob_sums: list[float] = []
        log_ratio_sums: list[float] = []
        token_sums: dict[str, float] = defaultdict(float)
        total_loss, num_tokens = 0.0, 0.0
        for k, batch in enumerate(self.steps[step]):
            start = len(log_prob_sums)
            share = terms.take(list(range(start, start + len(batch.sequences))))
            reference = self._reference(step, k, batch) if terms.needs_reference else None
            log_probs, entropies = self._forward(self.actor, batch, "entropy" in terms.columns)  # [B, T-1]
            detached = log_probs.detach()
            old = self.old.setdefault((step, k), detached) if terms.loss is not None else detached
            mask = batch.action_mask.to(log_probs)
            loss, tokens = micro_batch_loss(share, log_probs, mask, old, reference, entropies, self.kl_estimator)
            # DeepSpeed averages over the data-parallel ranks; the objective is a sum over them.
            self.strategy.backward(loss * self.dp_size, self.actor, None)
            total_loss += loss.item()
            log_prob_sums += detached.double().sum(-1).tolist()
            log_ratio_sums += (detached - old).double().sum(-1).tolist()
            tokens["mismatch"] = (detached - batch.rollout_log_probs.to(detached)).abs()
            counted = mask * share.column("real", mask)
            num_tokens += counted.sum().item()
            for name, values in tokens.items():
                token_sums[name] += (values * counted).sum().item()
        self.strategy.optimizer_step(None, self.actor, self.scheduler, name="actor")
        return Report(
            log_prob_sums=log_prob_sums,
            log_ratio_sums=log_ratio_sums,
            grad_norm=self.strategy.get_grad_norm(self.actor),
            lr=self.scheduler.get_last_lr()[0],
            loss=total_loss,
            token_sums=dict(token_sums),
            num_tokens=num_tokens,
        )

    def update_anchor(self, beta: float) -> None:
        self.anchor.update(self.actor, beta)

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
