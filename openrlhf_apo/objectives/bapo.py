"""BAPO: the clip bounds move until the positive samples have their share of the surrogate.

    L = -1/(sum_i |y_i|) sum_i sum_t min(r_it A_i, clip(r_it, c_low, c_high) A_i),  for A_i < 0 not below dual_clip A_i
    while share(c_low, c_high) < rho:  c_low += step up to its maximum, then c_high += step up to its maximum
    share = sum_{A>0} min(r, c_high) A / (sum_{A>0} min(r, c_high) A + sum_{A<0} max(r, c_low) |A|)

c_low and c_high are bounds of the ratio itself. In every optimizer step they start at the low end of their ranges, and
are computed from all tokens of the step. A higher c_low never raises this share: it takes the gradient of negative
tokens away, but counts them for more. So c_low is at its maximum before c_high moves.

Reference: arXiv 2510.18927. From the paper: rho = 0.5, the positive share of the total, and the ranges [0.6, 0.9] and
[1.2, 3.0]. From its public code: the step 0.05, the order (c_low first) and dual_clip = 3. The code has other ranges,
and compares positive with negative (target 1, which is the same at rho = 0.5).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from openrlhf_apo.settings import setting

from .clip import clipped_surrogate, ratio
from .registry import token_loss
from .terms import Terms
from .token_base import TokenLoss, TokenStep


@token_loss("bapo")
@dataclass(eq=False)
class Bapo(TokenLoss):
    rho: float = setting(0.5, "least share of positive samples in the surrogate", within="(0, 1)")
    low_range: tuple[float, float] = setting((0.6, 0.9), "range of the lower bound of the ratio")
    high_range: tuple[float, float] = setting((1.2, 3.0), "range of the upper bound of the ratio")
    step: float = setting(0.05, "by which a bound moves", within="(0, inf)")
    dual_clip: float | None = setting(
        3.0, "c: where A < 0 the loss of a token is at most c |A|", within="(1, inf)", flag="actor.dual_clip"
    )
    bounds: tuple[float, float] | None = None  # (c_low, c_high) of the optimizer step, not a setting

    aggregation = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        (low, low_max), (high, high_max) = self.low_range, self.high_range
        if not 0 < low <= low_max < 1 < high <= high_max:
            raise ValueError(
                f"need 0 < low <= low_max < 1 < high <= high_max, got {self.low_range}, {self.high_range}"
            )

    def terms(self, step: TokenStep) -> Terms:
        advantages = self.advantages(step.rewards)
        log_ratio = torch.cat(step.log_ratios())
        r = ratio(log_ratio, torch.zeros_like(log_ratio))
        per_token = advantages.flatten().repeat_interleave(step.lengths.flatten().long())
        bounds, share = self.balance(r, per_token)
        metrics = {"clip_low": bounds[0], "clip_high": bounds[1], "positive_share": share}
        return self.token_terms(step, advantages, replace(self, bounds=bounds), metrics=metrics)

    def balance(self, r: Tensor, advantages: Tensor) -> tuple[tuple[float, float], float]:
        """r[T], advantages[T] of all tokens of the step -> ((c_low, c_high), the share they give)."""
        r, advantages = r.double(), advantages.double()

        def share(low: float, high: float) -> float:
            positive = (r.clamp(max=high) * advantages.clamp(min=0)).sum()
            negative = (r.clamp(min=low) * (-advantages).clamp(min=0)).sum()
            total = (positive + negative).item()
            return positive.item() / total if total > 0 else 1.0

        (low, low_max), (high, high_max) = self.low_range, self.high_range
        while share(low, high) < self.rho and low < low_max:
            low = min(low + self.step, low_max)
        while share(low, high) < self.rho and high < high_max:
            high = min(high + self.step, high_max)
        return (low, high), share(low, high)

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert self.bounds is not None  # set by `terms`
        return clipped_surrogate(ratio(log_probs, old_log_probs), advantages, *self.bounds, self.dual_clip)
