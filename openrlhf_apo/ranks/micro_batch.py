"""Samples as tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from openrlhf_apo.trainer.samples import Sample


def pad_right(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T] each, of B sequences; 0 where there is no token."""
    ids = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    return ids, pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in sequences], batch_first=True)


@dataclass
class MicroBatch:
    """B right-padded samples of T tokens."""

    sequences: Tensor  # [B, T] prompt + response token ids
    attention_mask: Tensor  # [B, T]
    action_mask: Tensor  # [B, T-1], 1 where the policy chose the next token: the response, less feedback in it
    rollout_log_probs: Tensor  # [B, T-1] float32, 0 where action_mask is 0
    fresh: Tensor  # [B, 1], 0 for a sample of an earlier policy

    @classmethod
    def of(cls, samples: list[Sample], pad_token_id: int) -> "MicroBatch":
        def padded(rows: list[list], dtype: torch.dtype, value: float = 0) -> Tensor:
            return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], True, value)

        prompts = [len(s.prompt_ids) for s in samples]
        return cls(
            sequences=padded([s.prompt_ids + s.response_ids for s in samples], torch.long, pad_token_id),
            attention_mask=padded([[1] * s.total_length for s in samples], torch.long),
            action_mask=padded(
                [[0] * (p - 1) + (s.own or [1] * s.length) for p, s in zip(prompts, samples, strict=True)],
                torch.long,
            ),
            rollout_log_probs=padded(
                [[0.0] * (p - 1) + s.rollout_log_probs for p, s in zip(prompts, samples, strict=True)], torch.float32
            ),
            fresh=torch.tensor([[float(not s.stale)] for s in samples]),
        )

    def to(self, device) -> "MicroBatch":
        return MicroBatch(*(tensor.to(device) for tensor in vars(self).values()))
