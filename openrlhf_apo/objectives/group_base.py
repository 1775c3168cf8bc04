"""Group objectives: differentiable functions of log_ratio[G, P] and rewards[G, P], computed on whole groups.

    @group_loss("mine")
    def mine(log_ratio, rewards, context):           # -> [G]
        log_p = anchored_log_policy(log_ratio, context.tau_anc)
        return -(context.log_q.exp() * log_p).sum(-1)

The trainer takes c = dL/dlog_ratio of it, on whole groups. Training needs nothing else, so a group loss is exact under
any micro-batching, packing and sharding. docs/own_loss.md shows how to add one; cli.check_loss examines it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from openrlhf_apo.errors import LossError

from .registry import GROUP_LOSSES, Loss
from .uses import GROUP_USES, use_of


@dataclass(frozen=True, eq=False)
class GroupContext:
    """What a group loss may read beside log_ratio and rewards. All of it is constant during the step.

    log_q: [G, P], log of the Boltzmann target of the rewards (`--apo.beta_r`). alpha: a float, or [G] where each group
    has its own. lengths: [G, P], response tokens. tau_anc, weight_clip: `--apo.tau_anc`, `--apo.weight_clip`.

    A loss that reads log_q, alpha or weight_clip declares it (`uses=`).
    """

    log_q: Tensor
    lengths: Tensor
    alpha: float | Tensor
    tau_anc: float
    weight_clip: tuple[float, float] | None = None


class DeclaredContext:
    """A GroupContext of which only what the loss declares can be read."""

    def __init__(self, context: GroupContext, loss: Loss):
        self._context, self._loss = context, loss

    def __getattr__(self, field: str) -> Any:
        use, loss = use_of(field, GROUP_USES), self._loss
        if use is not None and use not in loss.uses:
            uses = ", ".join(repr(each) for each in [*sorted(loss.uses), use])
            raise LossError(
                f"group loss {loss.name!r} reads context.{field} without saying so: @group_loss({loss.name!r}, "
                f"uses=({uses},))"
            )
        return getattr(self._context, field)


GroupLoss = Callable[[Tensor, Tensor, GroupContext], Tensor]


def coefficients(
    name: str, log_ratio: Tensor, rewards: Tensor, context: GroupContext, loss: GroupLoss | None = None
) -> tuple[Tensor, Tensor]:
    """(loss[G], c[G, P]) of a registered loss, float64, with c = dL/dlog_ratio of each group. loss: the built loss;
    None builds it with its defaults.

    LossError, naming the loss, if its shape is not [G], if it has no gradient, or if a value is not finite.
    """
    loss = GROUP_LOSSES[name]() if loss is None else loss
    log_ratio = log_ratio.double().detach().requires_grad_()
    declared = cast(GroupContext, DeclaredContext(context, GROUP_LOSSES[name]))
    with torch.enable_grad():
        value = loss(log_ratio, rewards.double(), declared)
    expected = tuple(log_ratio.shape[:1])
    if not isinstance(value, Tensor) or tuple(value.shape) != expected:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"group loss {name!r} must return one value per group, shape {list(expected)}, got {got}")
    if not value.requires_grad:
        raise LossError(f"group loss {name!r} does not depend on log_ratio: it has no gradient")
    (c,) = torch.autograd.grad(value.sum(), log_ratio)
    for what, values in (("value", value.detach()[:, None]), ("gradient", c)):
        bad = ~values.isfinite().all(-1)
        if bad.any():
            group = int(bad.nonzero()[0])
            raise LossError(
                f"group loss {name!r} has a {what} that is not finite in group {group} "
                f"(rewards {rewards[group].tolist()}, log_ratio {log_ratio[group].tolist()})"
            )
    return value.detach(), c
