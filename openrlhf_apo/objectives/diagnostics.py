"""How spread out a group's distribution is: entropy (APO, arXiv 2512.22953, Eq. 19) and effective sample size (21)."""

import math

import torch


def normalized_entropy(log_p: torch.Tensor) -> torch.Tensor:
    """log_p[G, P], normalised -> H(p) / log P, shape [G], in [0, 1]. The paper's confidence c_t is one minus this."""
    log_p = log_p.double()
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return (entropy / math.log(log_p.shape[-1])).clamp(0.0, 1.0)


def ess(log_weights: torch.Tensor) -> torch.Tensor:
    """log_weights[..., P] -> effective sample size 1 / sum_i w_i^2, shape [...], in [1, P]. w is normalised here, so a
    constant added to log_weights changes nothing."""
    return 1.0 / torch.softmax(log_weights.double(), dim=-1).square().sum(dim=-1)
