"""alpha-PPO: the policy-gradient surrogate minus an alpha-divergence to the old policy, where PPO-KL has KL.

    L = -1/(sum_i |y_i|) sum_i sum_t [ r_it A_i - beta d_it ]
    d_it = (1 - r_it^(1-alpha) + (1-alpha) (r_it - 1)) / (alpha (1-alpha))

E_old[d] = D_alpha(pi_old || pi_theta) = (1 - E_old[r^(1-alpha)]) / (alpha (1-alpha)). The term (1-alpha) (r - 1) has
mean zero; with it d >= 0, and the gradient of d is zero at r = 1 (k3 does the same for KL). alpha -> 1 gives
KL(pi_old || pi_theta), alpha -> 0 gives KL(pi_theta || pi_old). No clip.

Reference: Xu et al., Neurocomputing 2023, "linearly combined form" of the return and a parametric alpha-divergence.
The paper's exact form and settings were not available: this form, alpha = 0.5 and beta = 1 are our reading.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_apo.settings import setting

from .clip import LOG_RATIO_LIMIT
from .registry import token_loss
from .token_base import TokenLoss


@token_loss("alpha_ppo")
@dataclass(eq=False)
class AlphaPpo(TokenLoss):
    alpha: float = setting(0.5, "order of the divergence", within="(0, 1)")
    beta: float = setting(1.0, "weight of the divergence", within="[0, inf)")

    aggregation = "token"

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        a = 1 - self.alpha
        divergence = (a * log_ratio.expm1() - (a * log_ratio).expm1()) / (self.alpha * a)
        return self.beta * divergence - log_ratio.exp() * advantages, torch.zeros_like(mask, dtype=torch.bool)
