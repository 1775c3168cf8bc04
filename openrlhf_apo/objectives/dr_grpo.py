"""Dr. GRPO: GRPO without its two biases, which are the division by the group's deviation and by the answer's length.

    L = -1/(N L_max) sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i),   A_i = R_i - mean R

L_max is the constant `--rollout.max_new_tokens`. (OpenRLHF's estimator `dr_grpo` changes the advantage only.)

Reference: arXiv 2503.20783, §3.2 and its code's constant normaliser; no KL.
"""

from dataclasses import dataclass

from torch import Tensor

from .checks import check_groups
from .clip import ClippedSurrogate
from .registry import token_loss


@token_loss("dr_grpo", uses=("max_length",))
@dataclass(eq=False)
class DrGrpo(ClippedSurrogate):
    aggregation = "constant"

    def advantages(self, rewards: Tensor) -> Tensor:
        rewards = check_groups("rewards", rewards)
        return rewards - rewards.mean(-1, keepdim=True)
