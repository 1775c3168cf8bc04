"""A group loss of your own: ADPO-softmax (arXiv 2510.18913), written from its formula.

    python -m openrlhf_apo.cli.check_loss examples/python/my_loss.py
    python -m openrlhf_apo.cli.train_apo_ray --config configs/tiny_cpu.yaml \
        --loss_path examples/python/my_loss.py --loss my_adpo_softmax

docs/own_loss.md says what a loss gets and must return.
"""

import torch

from openrlhf_apo.objectives import group_loss


@group_loss("my_adpo_softmax")
def my_adpo_softmax(log_ratio, rewards, context):
    """Cross-entropy between the target q, the softmax of the z-scored rewards, and the anchored policy p -> [G]."""
    log_p = torch.log_softmax(log_ratio / context.tau_anc, dim=-1)  # [G, P]
    return -(context.log_q.exp() * log_p).sum(dim=-1)
