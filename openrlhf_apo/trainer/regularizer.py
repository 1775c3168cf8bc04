"""Terms that go with any objective: KL to the reference (OpenRLHF's `--algo.kl.*`), ADRPO's, and entropy.

KL is weighed as the objective weighs its tokens: inside each answer's mean where the loss is one (GRPO, Eq. 3), a mean
over the tokens of the step where the loss is one, and for group objectives, which weigh no tokens. Entropy is a mean
over the tokens of the step, as OpenRLHF has it.
"""

from dataclasses import dataclass

import torch

from openrlhf_apo.objectives import Adrpo, Terms
from openrlhf_apo.trainer.kl_controller import AdaptiveKl
from openrlhf_apo.trainer.step import Step


@dataclass(frozen=True)
class Regularizer:
    """kl: coefficient beta, in the loss, or with `kl_in_reward` subtracted from the rewards of token objectives.
    controller: of that coefficient, from `kl` on; None: it stays. adrpo: a beta per sample, in its place.
    unbiased_gradient: of KL in the loss, whatever the estimator (objectives/kl.py). entropy: coefficient of the bonus;
    0.0 only measures, None does not."""

    kl: float = 0.0
    kl_in_reward: bool = False
    adrpo: Adrpo | None = None
    entropy: float | None = None
    kl_estimator: str = "k3"
    controller: AdaptiveKl | None = None
    unbiased_gradient: bool = False

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0 or self.adrpo is not None

    def add(self, terms: Terms, step: Step) -> None:
        """Add the columns and metrics of this step to `terms`."""
        token_mean = torch.full((step.lengths.numel(),), 1.0 / step.lengths.sum().item(), dtype=torch.float64)
        weight = terms.columns.get("weight", token_mean)  # [N]
        kl = self.kl
        if self.controller is not None:
            kl = terms.metrics["kl_coef"] = self.controller.value
        terms.unbiased_kl = self.unbiased_gradient
        if self.adrpo is not None:
            betas = self.adrpo.betas(step.rewards).flatten()
            terms.columns["kl"] = betas * weight
            terms.metrics |= {"adrpo_beta_mean": betas.mean().item(), "adrpo_beta_max": betas.max().item()}
        elif self.kl > 0 and self.kl_in_reward:
            terms.columns["kl_reward"] = kl * torch.ones_like(token_mean)
        elif self.kl > 0:
            terms.columns["kl"] = kl * weight
        if self.entropy is not None:
            terms.columns["entropy"] = self.entropy * token_mean
