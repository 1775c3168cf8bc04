"""GSPO: one importance ratio per answer, the geometric mean over its tokens.

    L = -1/N sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
    s_i = exp(1/|y_i| sum_t log r_it)

eps_low = 3e-4, eps_high = 4e-4. They are small because s is a mean over tokens: PPO's 0.2 would never bind.

Reference: arXiv 2507.18071, Eqs. 5-7 and §5.1.
"""

from dataclasses import dataclass

from torch import Tensor

from .clip import LOG_RATIO_LIMIT, ClippedSurrogate, clipped_surrogate
from .registry import token_loss


@token_loss("gspo")
@dataclass(eq=False)
class Gspo(ClippedSurrogate):
    eps_low: float = 3e-4
    eps_high: float = 4e-4

    aggregation = "sequence"
    ratio_of_answers = True

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each token has the loss of its answer; the mean over the tokens gives it back."""
        mean = ((log_probs - old_log_probs) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        s = mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().expand_as(log_probs)
        return clipped_surrogate(s, advantages, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip)
