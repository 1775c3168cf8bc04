"""A token loss of your own, with two flags: SAPO (arXiv 2511.20347), written from its formula.

    python -m openrlhf_apo.cli.check_loss examples/python/my_token_loss.py
    python -m openrlhf_apo.cli.train_apo_ray --config configs/tiny_cpu.yaml \
        --loss_path examples/python/my_token_loss.py --my_sapo.tau_neg 1.2

docs/own_loss.md says what a loss gets and must return.
"""

from dataclasses import dataclass

import torch

from openrlhf_apo.objectives import TokenLoss, ratio, token_loss
from openrlhf_apo.settings import setting


@token_loss("my_sapo")
@dataclass(eq=False)
class MySapo(TokenLoss):
    """A smooth gate in place of PPO's clip: -(4 / tau) sigmoid(tau (r - 1)) A."""

    tau_pos: float = setting(1.0, "temperature of the gate where A > 0", within="(0, inf)")
    tau_neg: float = setting(1.05, "temperature of the gate elsewhere", within="(0, inf)")

    aggregation = "sequence"  # a mean over the tokens of each answer, then over answers

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        tau = torch.where(advantages > 0, self.tau_pos, self.tau_neg)
        gate = 4 / tau * torch.sigmoid(tau * (ratio(log_probs, old_log_probs) - 1))
        return -gate * advantages, torch.zeros_like(mask, dtype=torch.bool)
