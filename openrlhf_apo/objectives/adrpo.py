"""ADRPO: the pull towards the reference weakens on good answers and strengthens on bad ones.

    L = L_RL + sum_i beta_i w sum_t KL_it(pi_theta || pi_ref),   beta_i = clip(beta_0 - A_i, beta_min, beta_max)

A_i: the z-score of the group; w: the weight that the objective gives a token. An answer with A_i > beta_0 would get a
negative beta_i, which rewards distance from the reference; beta_min = 0 keeps this from happening. Works beside any
objective.

Reference: arXiv 2510.18053. It does not publish beta_0 and the bounds for language models: beta_0 = 0.04 is GRPO's
beta, beta_max = 1 is ours.
"""

from dataclasses import dataclass

from torch import Tensor

from openrlhf_apo.settings import Checked, setting

from .token_base import group_z_score


@dataclass(frozen=True)
class Adrpo(Checked):
    beta_0: float = setting(0.04, "coefficient of an average answer")
    beta_min: float = setting(0.0, "lower bound; below 0 it rewards divergence from the reference")
    beta_max: float = setting(1.0, "upper bound")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min must not be above beta_max, got {self.beta_min} and {self.beta_max}")

    def betas(self, rewards: Tensor) -> Tensor:
        """rewards[G, P] -> beta[G, P], float64."""
        return (self.beta_0 - group_z_score(rewards)).clamp(self.beta_min, self.beta_max)
