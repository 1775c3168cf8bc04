"""CISPO: clip the importance weight, and keep the gradient of every token.

    L = -1/(sum_i |y_i|) sum_i sum_t sg[clip(r_it, 1 - eps_low, 1 + eps_high)] A_i log pi_theta(y_it)

Convention: bounds are 1 - eps_low and 1 + eps_high, as in the paper and in verl (TRL's eps_high is the bound itself).
The paper sets no lower bound and does not publish its upper one. Here eps_low = 1, which is no bound, and
1 + eps_high = 5, as in ScaleRL (arXiv 2510.13786); TRL recommends it.

Reference: MiniMax-M1, arXiv 2506.13585, Eqs. 4-5. A is GRPO's; no KL.
"""

from dataclasses import dataclass

from torch import Tensor

from .clip import ClippedLoss, ratio
from .registry import token_loss


@token_loss("cispo")
@dataclass(eq=False)
class Cispo(ClippedLoss):
    eps_low: float = 1.0
    eps_high: float = 4.0

    aggregation = "token"

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        r = ratio(log_probs, old_log_probs).detach()
        weight = r.clamp(1 - self.eps_low, 1 + self.eps_high)
        return -weight * advantages * log_probs, weight != r
