"""Group objectives by name: differentiable functions of log_ratio[G, P] and rewards[G, P], computed on whole groups.

    @group_loss("mine")
    def mine(log_ratio, rewards, context):           # -> [G]
        log_p = anchored_log_policy(log_ratio, context.tau_anc)
        return -(context.log_q.exp() * log_p).sum(-1)

The trainer takes c = dL/dlog_ratio, which is all that training needs, so a loss written here is exact under any
micro-batching, packing and sharding. `--loss_path FILE.py` loads one's own; cli.check_loss examines it.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class LossError(ValueError):
    """A group loss cannot be loaded or returned what cannot be trained on; the message is one line."""


@dataclass(frozen=True, eq=False)
class GroupContext:
    """What a group loss may use beside log_ratio and rewards; constants of the step.

    log_q: [G, P], the Boltzmann target of the rewards (`--apo.beta_r`). alpha: float, or [G] with a scope per group.
    lengths: [G, P], response tokens. tau_anc, weight_clip: `--apo.tau_anc`, `--apo.weight_clip`.
    """

    log_q: Tensor
    lengths: Tensor
    alpha: float | Tensor = 1.0
    tau_anc: float = 0.8
    weight_clip: tuple[float, float] | None = None


GroupLoss = Callable[[Tensor, Tensor, GroupContext], Tensor]
GROUP_LOSSES: dict[str, GroupLoss] = {}
_LOADED: dict[str, list[str]] = {}


def group_loss(name: str) -> Callable[[GroupLoss], GroupLoss]:
    """Register a function of (log_ratio[G, P], rewards[G, P], context), float64, that returns the loss of each group
    [G], as `--loss NAME`. Raises LossError for a name that is taken, or that no command line could hold."""

    def register(function: GroupLoss) -> GroupLoss:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise LossError(f"group loss name {name!r}: use letters, digits and underscores")
        if name in GROUP_LOSSES:
            raise LossError(f"group loss {name!r} exists already: choose another name")
        GROUP_LOSSES[name] = function
        return function

    return register


def load_losses(path: str) -> list[str]:
    """Run a Python file and return the names of the group losses it registered.

    A file that was loaded before is not run again. Raises LossError in one line when it cannot be run or registers
    none.
    """
    path = os.path.realpath(path)
    if path in _LOADED:
        return _LOADED[path]
    if not path.endswith(".py"):
        raise LossError(f"{path} is not a Python file (.py)")
    before = set(GROUP_LOSSES)
    try:
        spec = importlib.util.spec_from_file_location("openrlhf_apo_user_loss", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        for name in set(GROUP_LOSSES) - before:
            del GROUP_LOSSES[name]
        message = str(error).splitlines()[0] if str(error) else ""
        raise LossError(f"{path} cannot be loaded: {type(error).__name__}: {message}") from None
    names = [name for name in GROUP_LOSSES if name not in before]
    if not names:
        raise LossError(f'{path} registers no loss: decorate a function with @group_loss("name")')
    _LOADED[path] = names
    return names


def coefficients(name: str, log_ratio: Tensor, rewards: Tensor, context: GroupContext) -> tuple[Tensor, Tensor]:
    """(loss[G], c[G, P] = dL/dlog_ratio of each group) of a registered loss, float64.

    Raises LossError naming the loss for another shape than [G], a loss without gradient, or values not finite.
    """
    log_ratio = log_ratio.double().detach().requires_grad_()
    with torch.enable_grad():
        loss = GROUP_LOSSES[name](log_ratio, rewards.double(), context)
    expected = tuple(log_ratio.shape[:1])
    if not isinstance(loss, Tensor) or tuple(loss.shape) != expected:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise LossError(f"group loss {name!r} must return one value per group, shape {list(expected)}, got {got}")
    if not loss.requires_grad:
        raise LossError(f"group loss {name!r} does not depend on log_ratio: it has no gradient")
    (c,) = torch.autograd.grad(loss.sum(), log_ratio)
    for what, values in (("value", loss.detach()[:, None]), ("gradient", c)):
        bad = ~values.isfinite().all(-1)
        if bad.any():
            group = int(bad.nonzero()[0])
            raise LossError(
                f"group loss {name!r} has a {what} that is not finite in group {group} "
                f"(rewards {rewards[group].tolist()}, log_ratio {log_ratio[group].tolist()})"
            )
    return loss.detach(), c
