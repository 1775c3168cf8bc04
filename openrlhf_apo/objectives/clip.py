"""PPO's importance ratio and clipped surrogate, and the losses' settings for them (OpenRLHF's flags)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_apo.settings import setting

from .token_base import TokenLoss

# nats. OpenRLHF clamps log-ratios here, and verl too (GSPO: 10), so that exp stays finite. A ratio beyond e^20 has no
# gradient. This matters only where no clip has cut it before: A < 0 without dual clip, and in losses without a clip
# (gtpo, alpha_ppo).
LOG_RATIO_LIMIT = 20.0


def ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """pi_theta / pi_old of each token."""
    return (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, low, high) A); with dual_clip c, -max(min(...), c A) where A < 0. -> (loss, clipped).

    Shapes as in `TokenLoss.per_token`; low and high are bounds of the ratio itself. PPO, arXiv 1707.06347, Eq. 7; dual
    clip, arXiv 1912.09729, Eq. 5.
    """
    plain, bounded = ratio * advantages, ratio.clamp(low, high) * advantages
    gain, clipped = torch.min(plain, bounded), bounded < plain
    if dual_clip is not None:
        floor = dual_clip * advantages
        below = (advantages < 0) & (gain < floor)
        gain, clipped = torch.where(below, floor, gain), clipped | below
    return -gain, clipped


@dataclass(eq=False)
class ClippedLoss(TokenLoss):
    """Base of losses that keep the ratio in [1 - eps_low, 1 + eps_high]."""

    eps_low: float = setting(
        0.2, "the ratio is kept above 1 - LOW", within="[0, inf)", flag="actor.eps_clip_low_high", part=0
    )
    eps_high: float = setting(0.2, "and below 1 + HIGH", within="[0, inf)", flag="actor.eps_clip_low_high", part=1)


@dataclass(eq=False)
class ClippedSurrogate(ClippedLoss):
    """Base of losses with PPO's clipped surrogate of each token's ratio."""

    dual_clip: float | None = setting(
        None, "c: where A < 0 the loss of a token is at most c |A|", within="(1, inf)", flag="actor.dual_clip"
    )

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        return clipped_surrogate(
            ratio(log_probs, old_log_probs), advantages, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip
        )
