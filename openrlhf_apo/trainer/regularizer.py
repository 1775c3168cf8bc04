"""Terms that go with any objective: KL to the reference (OpenRLHF's `--algo.kl.*`), ADRPO's, and entropy.

Like OpenRLHF's they are means over the tokens of the optimizer step, whatever the objective's own aggregation is.
"""

from dataclasses import dataclass

import torch

from openrlhf_apo.objectives import Adrpo
from openrlhf_apo.trainer.step import Step, StepTerms


@dataclass(frozen=True)
class Regularizer:
    """kl: coefficient beta, in the loss, or with `kl_in_reward` subtracted from the rewards of token objectives.
    adrpo: a beta per sample, in its place. entropy: coefficient of the bonus; 0.0 only measures, None does not."""

    kl: float = 0.0
    kl_in_reward: bool = False
    adrpo: Adrpo | None = None
    entropy: float | None = None

    def add(self, terms: StepTerms, step: Step) -> dict[str, float]:
        """Add the columns of this step to `terms`. Returns metrics."""
        ones, tokens = torch.ones(step.lengths.numel(), dtype=torch.float64), step.lengths.sum()
        metrics = {}
        if self.adrpo is not None:
            betas = self.adrpo.betas(step.rewards).flatten()
            terms.columns["kl"] = betas / tokens
            metrics = {"adrpo_beta_mean": betas.mean().item(), "adrpo_beta_max": betas.max().item()}
        elif self.kl > 0 and self.kl_in_reward:
            terms.columns["kl_reward"] = self.kl * ones
        elif self.kl > 0:
            terms.columns["kl"] = self.kl * ones / tokens
        if self.entropy is not None:
            terms.columns["entropy"] = self.entropy * ones / tokens
        return metrics
