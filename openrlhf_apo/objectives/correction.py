"""Importance-sampling correction of the gap between the engine that sampled and the policy that is trained.

Both have the same weights when a rollout begins, and yet another arithmetic; so samples come from pi_rollout, and not
from pi_old. A gate reads one number per token ("token") or per answer ("seq"), and closes outside of [low, high]:

    ratio       pi_old / pi_rollout of the token; of an answer the geometric mean
    binary_kl   KL of "this token or another" under pi_rollout to that under pi_old; of an answer the mean
    tv          |pi_rollout - pi_old| of the token; of an answer the mean

A token's loss is multiplied by w_it = pi_old / pi_rollout where the gate is open, else by 0 (mask); or by the ratio
kept in [low, high] (clip). What a token counts in normalisers stays.

Reference: OpenRLHF 0.11.2's PolicyLoss (models/loss.py), whose values these are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMALLEST = 1e-6  # of a probability and its complement, for the logarithms of binary_kl


@dataclass(frozen=True)
class RolloutCorrection:
    level: Literal["token", "seq"] = "token"
    mode: Literal["mask", "clip"] = "mask"  # clip: of the ratio of tokens alone
    gating: Literal["ratio", "binary_kl", "tv"] = "ratio"
    low: float = 0.5
    high: float = 5.0

    def outside(self, old: Tensor, rollout: Tensor, mask: Tensor) -> Tensor:
        """Log-probs under pi_old and pi_rollout [nats] and mask of the response, [B, T] each -> [B, T] bool: whether
        the gate is closed to the token, or to its answer."""
        statistic = self._statistic(old, rollout)
        if self.level == "seq":
            mean = (statistic * mask).double().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
            statistic = mean.expand_as(mask)
        if self.gating == "ratio":
            statistic = statistic.exp()
        return (statistic < self.low) | (statistic > self.high)

    def weights(self, old: Tensor, rollout: Tensor, outside: Tensor) -> Tensor:
        """w[B, T], of `outside`, which is that of the same log-probs."""
        ratio = (old - rollout).exp()
        return ratio.clamp(self.low, self.high) if self.mode == "clip" else torch.where(outside, 0.0, ratio)

    def filtered_fraction(self, filtered: list[float], lengths: Tensor) -> float:
        """filtered[N]: tokens outside of the gate, of answers of so many tokens in all [N] -> the share of tokens, or
        of answers."""
        if self.level == "token":
            return sum(filtered) / lengths.sum().item()
        return sum(tokens > 0 for tokens in filtered) / len(filtered)

    def _statistic(self, old: Tensor, rollout: Tensor) -> Tensor:
        """Of each token [B, T]; of the ratio its logarithm."""
        if self.gating == "ratio":
            return old - rollout
        p, q = (log_probs.exp().clamp(SMALLEST, 1 - SMALLEST) for log_probs in (rollout, old))
        if self.gating == "tv":
            return (p - q).abs()
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
