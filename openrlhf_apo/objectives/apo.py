"""APO: pull the anchored policy p towards the target q by an alpha-divergence.

    L = D_alpha(q || p),  p = softmax((l - l^anchor) / tau_anc)                                        (2, 3, 7)
    c_i = dL/dl_i = -(w_i - p_i sum_j w_j) / (alpha tau_anc),  w_i = p_i r_i^alpha,  r = q/p           (11)
    with weight_clip:  w_i = p_i clip(r_i^alpha, w_min, w_max), in the gradient only                   (24)

c is all that training needs: the gradient of the loss is sum_i c_i grad l_i, whatever the batching. Over a group, c
sums to zero. At the anchor, l = l^anchor, -c_i = P^(alpha-1) (q_i^alpha - mean_j q_j^alpha) / (alpha tau_anc). This is
not zero; it is REINFORCE with a warped advantage. As alpha -> 0 the advantage becomes A_i / (P tau_anc beta_r), the
plain z-score.

Reference: APO, arXiv 2512.22953. Defaults are the paper's: tau_anc = 0.8, no clip (the paper names no values for one).
"""

import math
from dataclasses import dataclass

import torch

from openrlhf_apo.settings import Checked, check_number, setting

from .divergence import alpha_divergence, prepare, tilt
from .group_base import GroupContext
from .policy import anchored_log_policy
from .registry import group_loss


@dataclass(frozen=True)
class AlphaDivergenceLoss(Checked):
    """The loss of each group, and its exact derivative in the log-probabilities of the answers.

    tau_anc: temperature of the anchored policy. weight_clip: (w_min, w_max) with w_min <= 1 <= w_max, or None.
    ValueError, naming the field, for a bad setting.
    """

    tau_anc: float = setting(
        0.8,
        "temperature of the anchored policy p, for every group loss (Eq. 2)",
        within="(0, inf)",
        flag="apo.tau_anc",
    )
    weight_clip: tuple[float, float] | None = setting(
        None, "MIN MAX: clip r^alpha, in the gradient only (Eq. 24)", flag="apo.weight_clip", uses="weight_clip"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_clip is None:
            return
        w_min, w_max = self.weight_clip
        check_number("weight_clip w_min", w_min, "(0, 1]")
        check_number("weight_clip w_max", w_max, "[1, inf)")
        if w_min == w_max:
            raise ValueError("weight_clip (1, 1) removes the whole gradient; leave room on one side of 1")

    def __call__(self, log_ratio: torch.Tensor, log_q: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
        """log_ratio[G, P] [nats], log_q[G, P], alpha (float or [G], in [0, 1]) -> D_alpha(q || p) [G], float64.

        The value is never clipped. The gradient is `coefficients`, in log_ratio only; q is a constant.
        """
        log_ratio = log_ratio.double()
        coefficients = self.coefficients(log_ratio, log_q, alpha)
        with torch.no_grad():
            value = alpha_divergence(log_q, anchored_log_policy(log_ratio, self.tau_anc), alpha)
        # The added term is zero; it carries the gradient.
        return value + (coefficients * (log_ratio - log_ratio.detach())).sum(dim=-1)

    @torch.no_grad()
    def coefficients(self, log_ratio: torch.Tensor, log_q: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
        """c[G, P] = dL/dl, float64, of the same arguments. At alpha = 0 it is p (log(p/q) - KL(p || q)) / tau_anc."""
        log_q, log_p, alpha = prepare(log_q, anchored_log_policy(log_ratio, self.tau_anc), alpha)
        log_r = log_q - log_p
        if self.weight_clip is not None:  # clipping r^alpha is clipping log r
            low, high = (math.log(w) / alpha.clamp(min=torch.finfo(alpha.dtype).tiny) for w in self.weight_clip)
            log_r = log_r.clamp(low, high)
        # (w - p) / alpha instead of w / alpha gives the same c, as p sums to one, and stays exact near q = p.
        pull = tilt(log_p, log_r, alpha)
        c = (log_p.exp() * pull.sum(dim=-1, keepdim=True) - pull) / self.tau_anc
        # Where p has nearly all its mass on one completion, that one's c is lost to rounding, and the others' are not.
        top = log_p.argmax(dim=-1, keepdim=True)
        c.scatter_(-1, top, 0.0)
        return c.scatter_(-1, top, -c.sum(dim=-1, keepdim=True))


@group_loss("apo", uses=("target", "alpha", "weight_clip"))
def apo(log_ratio: torch.Tensor, rewards: torch.Tensor, context: GroupContext) -> torch.Tensor:
    """log_ratio[G, P], rewards[G, P] (through context.log_q) -> [G]."""
    return AlphaDivergenceLoss(context.tau_anc, context.weight_clip)(log_ratio, context.log_q, context.alpha)
