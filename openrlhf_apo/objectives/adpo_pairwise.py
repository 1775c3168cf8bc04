"""ADPO, pairwise: the better of two answers should have gained more on the anchor.

    L = mean over pairs with R_i > R_j of softplus(-(u_i - u_j)),  u = log_ratio / tau_anc

Pairs of equal rewards are left out. A group that has only such pairs has loss and gradient zero.

Reference: ADPO, arXiv 2510.18913, the pairwise variant of its public code, with hard comparisons.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .group_base import GroupContext
from .registry import group_loss


@group_loss("adpo_pairwise", uses=())
def adpo_pairwise(log_ratio: Tensor, rewards: Tensor, context: GroupContext) -> Tensor:
    """log_ratio[G, P], rewards[G, P] -> [G]."""
    u = log_ratio / context.tau_anc
    better = rewards[:, :, None] > rewards[:, None, :]  # [G, P, P]: i better than j
    loss = -logsigmoid(u[:, :, None] - u[:, None, :])  # softplus is linear from 20 on: 1e-9 off
    return torch.where(better, loss, 0.0).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
