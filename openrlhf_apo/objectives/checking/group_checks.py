"""What a group loss does on random groups.

Errors are a wrong shape, no gradient, values that are not finite on ordinary inputs, and a coefficient that depends on
the other groups of the batch or on the order of the answers.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from openrlhf_apo.errors import LossError, in_one_line
from openrlhf_apo.objectives.group_base import coefficients
from openrlhf_apo.objectives.registry import GROUP_LOSSES
from openrlhf_apo.objectives.uses import GROUP_USES

from . import findings
from .findings import TOLERANCE, differ, watch
from .random_groups import Batch, Rewards, random_batch

SHAPES = ((3, 2), (2, 3), (4, 8))  # (G, P); different, so that a mix-up of the two shows
VARIED: tuple[Rewards, ...] = ("binary", "graded")
EXTREMES: dict[str, dict[str, Any]] = {
    "log_ratio ±50 nats": {"log_ratio": "large"},
    "lengths of 1 and 100,000": {"lengths": "extreme"},
}


def gradient(name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss[G], c[G, P]) as the trainer takes them; whatever the function raises becomes a LossError of one line."""
    inputs = (batch.rewards, batch.context.log_q, batch.context.lengths)
    before = [values.clone() for values in inputs]
    try:
        result = coefficients(name, batch.log_ratio, batch.rewards, batch.context)
    except LossError:
        raise
    except Exception as error:  # your own code
        G, P = batch.rewards.shape
        raise LossError(f"group loss {name!r} fails at G = {G}, P = {P}: {in_one_line(error)}") from None
    if not all(map(torch.equal, before, inputs)):
        raise LossError(f"group loss {name!r} changes its inputs in place: work on copies")
    return result


def _varied(name: str, shape: tuple[int, int], **choice: Any) -> Tensor:
    """c[2, G, P] on binary and on graded rewards."""
    return torch.stack([gradient(name, random_batch(shape, rewards, **choice))[1] for rewards in VARIED])


def _show(c: Tensor) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in c.tolist())}]"


def check_shape(name: str) -> str:
    for shape in SHAPES:
        for rewards in ("equal", *VARIED):
            for log_ratio in ("anchor", "moderate"):
                loss, _ = gradient(name, random_batch(shape, rewards, log_ratio))
    if not any(_varied(name, shape).any() for shape in SHAPES):
        raise LossError(f"group loss {name!r} has gradient zero everywhere: is log_ratio detached?")
    if loss.dtype != torch.float64:
        return f"[G], but {str(loss.dtype).removeprefix('torch.')}: digits are lost, stay in float64"
    return "[G], float64"


def check_finite(name: str) -> str:
    for what, choice in EXTREMES.items():
        for rewards in ("equal", *VARIED):
            try:
                gradient(name, random_batch((16, 4), rewards, **choice))
            except LossError as error:
                return f"yes, but training would stop at {what}: {error}"
    return f"value and gradient, also with {', '.join(EXTREMES)}"


def check_repeatable(name: str) -> str:
    if differ(_varied(name, (4, 4)), _varied(name, (4, 4))):
        raise LossError(f"group loss {name!r} gives different gradients for the same inputs: is it random?")
    return "the same inputs give the same gradient"


def check_groups(name: str) -> str:
    for rewards in VARIED:
        batch = random_batch((4, 3), rewards)
        together = gradient(name, batch)[1]
        for groups in (slice(0, 2), *(slice(g, g + 1) for g in range(4))):
            alone = gradient(name, batch.select(groups))[1]
            if differ(alone, together[groups]):
                g = int((alone - together[groups]).abs().amax(-1).argmax())
                raise LossError(
                    f"group loss {name!r} depends on which groups share a step: c of a group is "
                    f"{_show(together[groups][g])} among 4 groups and {_show(alone[g])} among {len(alone)}; "
                    "reduce over the last dimension only"
                )
    return "a group's gradient does not depend on the others"


def check_permutation(name: str) -> str:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for rewards in VARIED:
        batch = random_batch((3, 6), rewards)
        first, second = gradient(name, batch)[1][:, order], gradient(name, batch.select(answers=order))[1]
        if differ(first, second):
            g = int((first - second).abs().amax(-1).argmax())
            raise LossError(
                f"group loss {name!r} is not permutation equivariant: with rewards {batch.rewards[g, order].tolist()} "
                f"the order of the answers changes their c from {_show(first[g])} to {_show(second[g])}"
            )
    return "reordering the answers reorders the gradient"


def check_gradient(name: str) -> str:
    h, errors, size = 1e-4, [], 0.0
    for rewards in VARIED:
        batch = random_batch((4, 4), rewards)
        batch = replace(batch, log_ratio=batch.log_ratio * math.sqrt(0.9))  # off the grid: no clip has its kink there
        c = gradient(name, batch)[1]
        size = max(size, c.abs().max().item())
        for i, step in enumerate(h * torch.eye(4, dtype=torch.float64)):
            up, down = (gradient(name, replace(batch, log_ratio=batch.log_ratio + s * step))[0] for s in (1, -1))
            errors.append(((up - down) / (2 * h) - c[:, i]).abs().max().item())
    if max(errors) > 1e-4 * size:
        return f"the gradient is not that of the value, |difference| up to {max(errors):.2g}: right only if meant"
    return "that of the value, by finite differences"


def check_equal_rewards(name: str, log_ratio: Literal["anchor", "moderate"]) -> str:
    batch = random_batch((4, 4), "equal", log_ratio)
    c = gradient(name, batch)[1]
    worst = c.abs().max().item()
    if worst <= 1e-9 * _varied(name, (4, 4)).abs().max().item():
        return "zero"
    x = batch.log_ratio - batch.log_ratio.mean(-1, keepdim=True)
    fate = "pulled back to the anchor" if ((c * x).sum(-1) > 0).all() else "trained on"
    return f"not zero: |c| up to {worst:.2g}: groups of equal rewards will be {fate}"


def check_sum(name: str) -> str:
    c = _varied(name, (4, 4))
    share = (c.sum(-1).abs().max() / c.abs().sum(-1).max()).item()
    if share <= TOLERANCE:
        return "zero: a constant added to log_ratio changes nothing"
    return f"not zero: up to {share:.0%} of sum |c|: all answers of a group can rise or fall together"


def check_direction(name: str) -> str:
    rewards = torch.stack([random_batch((8, 8), rewards).rewards for rewards in VARIED])
    c = _varied(name, (8, 8), log_ratio="anchor")
    rise = -(c * (rewards - rewards.mean(-1, keepdim=True))).sum(-1).flatten()  # [16]
    return findings.direction(rise, "at the anchor")


def check_scale(name: str) -> str:
    own, apo = (_varied(loss, (8, 8), log_ratio="anchor").abs().mean().item() for loss in (name, "apo"))
    return findings.scale(own / apo, "c", "at the anchor", "apo", " at alpha 0.6")


def check_alpha(name: str) -> str:
    alphas = (0.2, 0.4, 0.6, 0.9)
    separate = [_varied(name, (4, 4), alpha=alpha) for alpha in alphas]
    if not any(differ(separate[0], c) for c in separate[1:]):
        if "alpha" in GROUP_LOSSES[name].uses:
            return f"is declared but does not matter: {GROUP_USES['alpha'].unread}; drop it from uses="
        return "does not matter"
    try:
        together = _varied(name, (4, 4), alpha=torch.tensor(alphas, dtype=torch.float64))
        right = not differ(together, torch.stack([c[:, g] for g, c in enumerate(separate)], dim=1))
    except LossError:
        right = False
    return "matters" if right else "matters, but not one per group as [G]: --apo.ess_scope group would be wrong"


def check_uses(name: str) -> str:
    read: set[str] = set()
    for rewards in ("equal", *VARIED):
        for log_ratio in ("anchor", "moderate"):
            batch = random_batch((4, 4), rewards, log_ratio)
            fields = watch(batch.context)
            coefficients(name, batch.log_ratio, batch.rewards, batch.context)
            read |= fields
    return findings.unread_uses(GROUP_LOSSES[name], GROUP_USES, read, "context")


CHECKS: dict[str, Callable[[str], str]] = {
    "settings": lambda name: findings.check_settings("group", GROUP_LOSSES[name]),
    "shape": check_shape,
    "finite": check_finite,
    "repeatable": check_repeatable,
    "groups": check_groups,
    "permutation": check_permutation,
    "gradient": check_gradient,
    "equal rewards, at anchor": lambda name: check_equal_rewards(name, "anchor"),
    "equal rewards, off it": lambda name: check_equal_rewards(name, "moderate"),
    "sum of c per group": check_sum,
    "better answers": check_direction,
    "scale": check_scale,
    "uses": check_uses,
    "alpha": check_alpha,
}
