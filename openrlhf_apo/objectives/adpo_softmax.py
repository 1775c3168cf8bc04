"""ADPO, softmax: cross-entropy between the target and the anchored policy.

    L = -sum_i q_i log p_i,  p = softmax(log_ratio / tau_anc),  q = softmax(A / beta_r)
    c_i = (p_i - q_i) / tau_anc

APO at alpha -> 1 is this plus a constant: minus the entropy of q, which has no gradient.

Reference: ADPO, arXiv 2510.18913. Its tau_anc is 0.8; its beta_r is 0.5, here 1.0 as in the APO paper's comparison.
"""

from torch import Tensor

from .group_base import GroupContext
from .policy import anchored_log_policy
from .registry import group_loss


@group_loss("adpo_softmax")
def adpo_softmax(log_ratio: Tensor, rewards: Tensor, context: GroupContext) -> Tensor:
    """log_ratio[G, P], rewards[G, P] (through context.log_q) -> [G]."""
    return -(context.log_q.exp() * anchored_log_policy(log_ratio, context.tau_anc)).sum(-1)
