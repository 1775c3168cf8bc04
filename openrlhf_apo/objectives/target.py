"""The target q of a group: how likely each of its P completions should be, given their rewards.

    A_i = (R_i - mean R) / (sigma_R + eps)     sigma_R: population standard deviation, 1/P     (4)
    q   = softmax(A / beta_r)                                                                  (5)

Reference: APO, arXiv 2512.22953, Eqs. 4-5. Default beta_r = 1.0 is the paper's.
"""

from dataclasses import dataclass

import torch

from openrlhf_apo.settings import Checked, check_number, setting

from .checks import check_groups


@dataclass(frozen=True)
class GroupTargetBuilder(Checked):
    """Turns rewards into log q.

    beta_r: temperature of the target; smaller is greedier. eps: keeps the z-score finite, in units of reward.
    ValueError, naming the field, for a bad setting.
    """

    beta_r: float = setting(
        1.0, "temperature of the target q (Eq. 5)", within="(0, inf)", flag="apo.beta_r", uses="target"
    )
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eps", self.eps, "(0, inf)")

    def __call__(self, rewards: torch.Tensor) -> torch.Tensor:
        """rewards[G, P] -> log_q[G, P], float64. A group of equal rewards gives exactly the uniform distribution.

        ValueError, naming the group, for rewards that are not finite.
        """
        rewards = check_groups("rewards", rewards)
        # Equal rewards may miss their mean by a rounding, but all by the same one, which the softmax takes out again.
        advantage = rewards - rewards.mean(dim=-1, keepdim=True)
        advantage = advantage / (rewards.std(dim=-1, correction=0, keepdim=True) + self.eps)
        return torch.log_softmax(advantage / self.beta_r, dim=-1)
