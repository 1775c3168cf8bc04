"""APO with a fixed alpha that may lie outside of [0, 1], which --apo.alpha does not allow.

    .venv/bin/python -m openrlhf_apo.cli.train_apo_ray --config configs/tiny_cpu.yaml \
        --loss_path examples/python/any_alpha.py --loss any_alpha --any_alpha.alpha 1.5

D_alpha(q || p) = (sum_j q_j^alpha p_j^(1-alpha) - 1) / (alpha (alpha - 1)), as in openrlhf_apo/objectives/apo.py.
Above 1 an answer with a p far below its q pulls with a weight that has no bound; below 0 it is one far above. What
came of it: docs/evidence.md.
"""

from dataclasses import dataclass

import torch

from openrlhf_apo.objectives import group_loss
from openrlhf_apo.settings import setting


@group_loss("any_alpha")
@dataclass(frozen=True)
class AnyAlpha:
    alpha: float = setting(1.5, "alpha, neither 0 nor 1", within="(-inf, inf)")

    def __post_init__(self):
        if self.alpha in (0, 1):
            raise ValueError("alpha 0 and 1 are limits of the formula: use --loss apo --alpha_mode fixed for them")

    def __call__(self, log_ratio, rewards, context):
        log_p = torch.log_softmax(log_ratio / context.tau_anc, dim=-1)  # [G, P]
        log_sum = torch.logsumexp(self.alpha * context.log_q + (1 - self.alpha) * log_p, dim=-1)
        return (log_sum.exp() - 1) / (self.alpha * (self.alpha - 1))
