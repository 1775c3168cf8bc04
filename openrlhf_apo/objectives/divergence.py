"""The alpha-divergence D_alpha(q || p) between two distributions over a group, to full precision.

    D_alpha(q || p) = (1 - sum_i q_i^alpha p_i^(1-alpha)) / (alpha (1-alpha))     alpha in (0, 1)     (7)
    alpha -> 1: KL(q || p), mass covering     (8)
    alpha -> 0: KL(p || q), mode seeking      (9)

Reference: APO, arXiv 2512.22953, Eqs. 7-9; the alpha-loss of f-PO, arXiv 2410.21662.

Equation 7 cannot be computed as printed: where q is close to p, it subtracts from 1 a sum that is nearly 1. Float64
is good to 1e-16, so a divergence of 1e-12 keeps four digits, and none at alpha = 1e-4. For normalised q and p the same
number, with s = log(q/p), w = q^alpha p^(1-alpha) and psi(x) = (e^x - 1 - x) / x^2, is

    D_alpha = sum_i w_i s_i^2 [(1-alpha) psi((1-alpha) s_i) + alpha psi(-alpha s_i)]

psi is positive, so nothing cancels, and both KL limits are ordinary values of alpha. Rounded inputs do little harm: if
q and p miss unit mass by e, this form is off by about e^2, and Equation 7 by e / alpha.
"""

import torch

from .checks import check_groups


def alpha_divergence(log_q: torch.Tensor, log_p: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    """D_alpha(q || p) of each group: log_q[G, P], log_p[G, P], alpha (float or [G]) -> [G], float64.

    log_q and log_p must be normalised (a log_softmax). ValueError if they are not finite, or alpha is not in [0, 1].
    Differentiable once in log_q and log_p, not in alpha. Only the rounding of its inputs limits the precision: the
    relative error is below 1e-6 where |log q - log p| is above 1e-8.
    """
    log_q, log_p, alpha = prepare(log_q, log_p, alpha)
    with torch.no_grad():
        log_r = log_q - log_p
        log_w = log_p + alpha * log_r
        value = (1 - alpha) * _psi(log_w, (1 - alpha) * log_r) + alpha * _psi(log_w, -alpha * log_r)
        value = (value * log_r.square()).sum(dim=-1)
        # D_alpha(q || p) = D_(1-alpha)(p || q), so one derivative gives both.
        grad_p = -tilt(log_p, log_r, alpha)
        grad_q = -tilt(log_q, -log_r, 1 - alpha)
    # The added terms are zero; they carry the exact derivatives, where autograd would round its way through _psi.
    return value + (grad_p * (log_p - log_p.detach()) + grad_q * (log_q - log_q.detach())).sum(dim=-1)


def tilt(log_p: torch.Tensor, log_r: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """(p r^alpha - p) / alpha, elementwise; p log r at alpha = 0. With r = q/p this is -dD_alpha(q || p) / dlog p.

    The larger of p r^alpha and p is factored out, so that nothing overflows, and expm1 takes their difference.
    """
    x = alpha * log_r
    larger = torch.maximum(log_p + x, log_p).exp()
    return larger * log_r * torch.where(x == 0, 1.0, -torch.expm1(-x.abs()) / x.abs())


def prepare(
    log_q: torch.Tensor, log_p: torch.Tensor, alpha: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check log_q[G, P], log_p[G, P] and alpha; return them in float64, alpha shaped to broadcast over the groups."""
    log_q, log_p = check_groups("log_q", log_q), check_groups("log_p", log_p)
    if log_q.shape != log_p.shape:
        raise ValueError(f"log_q and log_p must have one shape, got {list(log_q.shape)} and {list(log_p.shape)}")
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=log_p.device)
    if alpha.shape not in ((), log_p.shape[:1]):
        raise ValueError(f"alpha must be a number or have shape [{len(log_p)}], got {list(alpha.shape)}")
    if not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"alpha must be in [0, 1], got {alpha.tolist()}")
    return log_q, log_p, alpha.unsqueeze(-1)


def _psi(log_w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """w (e^x - 1 - x) / x^2; w e^x is a product of probabilities, so taking it as exp(log w + x) cannot overflow."""
    small = x.abs() < 0.1  # where e^x - 1 - x would cancel
    series = torch.zeros_like(x)
    for k in range(10, 1, -1):  # 1/2! + x/3! + ... + x^8/10!, innermost term first
        series = (series * x + 1) / k
    series = log_w.exp() * series
    safe_x = torch.where(small, 1.0, x)
    closed = ((log_w + x).exp() - log_w.exp() * (1 + x)) / safe_x.square()
    return torch.where(small, series, closed)
