"""One rank's share of a group objective: log-prob sums, and Σ_i c_i ℓ_i forward and backward.

Runs inside a Ray actor, but needs only torch.distributed, OpenRLHF's Actor and its DeepSpeed engine.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from openrlhf.models import Actor
from openrlhf.utils.utils import zero_pad_sequences
from torch import Tensor

from openrlhf_apo.trainer.anchor_weights import AnchorWeights
from openrlhf_apo.trainer.samples import Sample


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
class RankReport:
    """StepReport of one rank; the sums are over its own tokens."""

    log_prob_sums: list[float]
    grad_norm: float
    lr: float
    mismatch_sum: float
    num_tokens: int


class GroupLearner:
    """Holds this rank's micro-batches of a rollout. All ranks make the same calls with equally many micro-batches."""

    def __init__(self, strategy, actor: Actor, scheduler, pad_token_id: int, anchor: AnchorWeights | None):
        self.strategy, self.actor, self.scheduler = strategy, actor, scheduler
        self.pad_token_id, self.anchor = pad_token_id, anchor
        self.dp_size = dist.get_world_size(group=strategy.ds_device_mesh["dp"].get_group())
        self.steps: list[list[MicroBatch]] = []

    def load_steps(self, steps: list[list[list[Sample]]]) -> None:
        """steps[step][micro-batch] = samples. Replaces the rollout before."""
        self.steps = [[MicroBatch.of(samples, self.pad_token_id) for samples in step] for step in steps]

    @torch.no_grad()
    def log_prob_sums(self, step: int, weights: str) -> list[float]:
        """Σ_t log π of this rank's samples of the step, in the order they were loaded, nats."""
        model = self.anchor.model if weights == "anchor" else self.actor
        model.eval()
        sums: list[float] = []
        for batch in self.steps[step]:
            sums += self._action_log_probs(model, batch).double().sum(-1).tolist()
        return sums

    def apply_coefficients(self, step: int, coefficients: list[float]) -> RankReport:
        """Gradient of Σ_i coefficients[i] ℓ_i over all ranks' samples, then one optimizer step."""
        self.actor.train()
        sums: list[float] = []
        mismatch_sum, num_tokens = 0.0, 0
        for batch in self.steps[step]:
            log_probs = self._action_log_probs(self.actor, batch)  # [B, T-1]
            c = torch.tensor(coefficients[len(sums) : len(sums) + len(log_probs)], dtype=torch.float64)
            # DeepSpeed averages over the data-parallel ranks; the objective is a sum over them.
            loss = (c.to(log_probs) * log_probs.sum(-1)).sum() * self.dp_size
            self.strategy.backward(loss, self.actor, None)
            detached = log_probs.detach()
            sums += detached.double().sum(-1).tolist()
            mask = batch.action_mask.to(detached)
            mismatch_sum += ((detached - batch.rollout_log_probs.to(detached)).abs() * mask).sum().item()
            num_tokens += int(batch.action_mask.sum())
        self.strategy.optimizer_step(None, self.actor, self.scheduler, name="actor")
        return RankReport(
            log_prob_sums=sums,
            grad_norm=self.strategy.get_grad_norm(self.actor),
            lr=self.scheduler.get_last_lr()[0],
            mismatch_sum=mismatch_sum,
            num_tokens=num_tokens,
        )

    def _action_log_probs(self, model: Actor, batch: MicroBatch) -> Tensor:
        batch = batch.to(torch.cuda.current_device())
        return model(
            batch.sequences, batch.action_mask, batch.attention_mask, ring_attn_group=self.strategy.ring_attn_group
        )
