"""The anchored policy p: the policy's own distribution over a group, measured from an anchor.

    u_i = (l_i - l_i^anchor) / tau_anc     l_i = log pi(y_i | x), in nats     (2)
    p   = softmax(u)                                                          (3)

Reference: APO, arXiv 2512.22953, Eqs. 2-3. The paper's tau_anc is 0.8.
"""

import torch

from openrlhf_apo.settings import check_number

from .checks import check_groups


def anchored_log_policy(log_ratio: torch.Tensor, tau_anc: float) -> torch.Tensor:
    """log_ratio[G, P] = l - l^anchor [nats] -> log_p[G, P], float64, differentiable.

    ValueError for tau_anc <= 0, and, naming the group, for a log-ratio that is not finite.
    """
    check_number("tau_anc", tau_anc, "(0, inf)")
    return torch.log_softmax(check_groups("log_ratio", log_ratio) / tau_anc, dim=-1)
