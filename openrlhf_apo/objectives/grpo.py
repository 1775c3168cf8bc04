"""GRPO: PPO's clipped surrogate with the z-score of the group as advantage.

    L = -1/N sum_i 1/|y_i| sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)
    A_i = (R_i - mean R) / std R

Reference: DeepSeekMath, arXiv 2402.03300, Eq. 3; its KL to the reference, beta = 0.04 with the k3 estimator, is the
trainer's `--algo.kl.*`. eps = 0.2 is PPO's. std is the sample one (1/(P-1)), as in OpenRLHF, TRL and verl.
"""

from dataclasses import dataclass

from .token_loss import TokenLoss, clipped_surrogate, ratio


@dataclass(eq=False)
class Grpo(TokenLoss):
    """eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high]. dual_clip: > 1, or None."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None

    aggregation = "sequence"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        return clipped_surrogate(
            ratio(log_probs, old_log_probs), advantages, 1 - self.eps_low, 1 + self.eps_high, self.dual_clip
        )
