"""ADPO, Plackett-Luce: the likelihood of the ranking by reward, best first (ListMLE).

    L = 1/P sum_i [ log(exp u_i + sum_{j: R_j < R_i} exp u_j) - u_i ],  u = log_ratio / tau_anc

Without ties this is 1/P times the negative log-likelihood of drawing the answers in order of reward. Ties are left
out: an answer competes only with answers of lower reward, so nothing depends on how a sort breaks ties. (The public
code sorts. With binary rewards it fits an arbitrary order among equals.) Equal rewards give zero.

Reference: ADPO, arXiv 2510.18913, the listwise variant; without its code's label smoothing, top-k and poly-loss.
"""

import torch
from torch import Tensor

from .group_base import GroupContext
from .registry import group_loss


@group_loss("adpo_plackett_luce", uses=())
def adpo_plackett_luce(log_ratio: Tensor, rewards: Tensor, context: GroupContext) -> Tensor:
    """log_ratio[G, P], rewards[G, P] -> [G]."""
    u = log_ratio / context.tau_anc
    same = torch.eye(u.shape[-1], dtype=torch.bool, device=u.device)
    rivals = (rewards[:, None, :] < rewards[:, :, None]) | same  # [G, P, P]: j against whom i is drawn, i included
    log_total = torch.where(rivals, u[:, None, :], -torch.inf).logsumexp(-1)
    return (log_total - u).mean(-1)
