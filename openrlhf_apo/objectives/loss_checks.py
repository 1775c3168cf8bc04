"""What a registered group loss does on random groups, for cli.check_loss.

A check takes the loss's name and returns a finding, one line of text. It raises LossError, one line, for what cannot
be trained on: a wrong shape, no gradient, a value that is not finite on ordinary inputs, a coefficient that depends on
the other groups of the batch or on the order of the answers.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from openrlhf_apo.errors import LossError

from .group_base import coefficients
from .random_groups import Batch, Rewards, random_batch

SHAPES = ((3, 2), (2, 3), (4, 8))  # (G, P); different, so that a mix-up of the two shows
VARIED: tuple[Rewards, ...] = ("binary", "graded")
REWARDS: tuple[Rewards, ...] = ("equal", *VARIED)
EXTREMES: dict[str, dict[str, Any]] = {
    "log_ratio ±50 nats": {"log_ratio": "large"},
    "lengths of 1 and 100,000": {"lengths": "extreme"},
}
TOLERANCE = 1e-6  # of the largest |c|; wide enough for a loss that computes in float32


def gradient(name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss[G], c[G, P]) as the trainer takes them; whatever the function raises becomes a LossError of one line."""
    inputs = (batch.rewards, batch.context.log_q, batch.context.lengths)
    before = [values.clone() for values in inputs]
    try:
        result = coefficients(name, batch.log_ratio, batch.rewards, batch.context)
    except LossError:
        raise
    except Exception as error:  # the user's code
        message = str(error).splitlines()[0] if str(error) else ""
        G, P = batch.rewards.shape
        raise LossError(f"group loss {name!r} fails at G = {G}, P = {P}: {type(error).__name__}: {message}") from None
    if not all(map(torch.equal, before, inputs)):
        raise LossError(f"group loss {name!r} changes its inputs in place: work on copies")
    return result


def _varied(name: str, shape: tuple[int, int], **choice: Any) -> Tensor:
    """c[2, G, P] on binary and on graded rewards."""
    return torch.stack([gradient(name, random_batch(shape, rewards, **choice))[1] for rewards in VARIED])


def _differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > TOLERANCE * max(a.abs().max().item(), b.abs().max().item())


def _show(c: Tensor) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in c.tolist())}]"


def check_shape(name: str) -> str:
    for shape in SHAPES:
        for rewards in REWARDS:
            for log_ratio in ("anchor", "moderate"):
                loss, _ = gradient(name, random_batch(shape, rewards, log_ratio))
    if not any(_varied(name, shape).any() for shape in SHAPES):
        raise LossError(f"group loss {name!r} has gradient zero everywhere: is log_ratio detached?")
    if loss.dtype != torch.float64:
        return f"[G], but {str(loss.dtype).removeprefix('torch.')}: digits are lost, stay in float64"
    return "[G], float64"


def check_finite(name: str) -> str:
    for what, choice in EXTREMES.items():
        for rewards in REWARDS:
            try:
                gradient(name, random_batch((16, 4), rewards, **choice))
            except LossError as error:
                return f"yes, but training would stop at {what}: {error}"
    return f"value and gradient, also with {', '.join(EXTREMES)}"


def check_repeatable(name: str) -> str:
    if _differ(_varied(name, (4, 4)), _varied(name, (4, 4))):
        raise LossError(f"group loss {name!r} gives different gradients for the same inputs: is it random?")
    return "the same inputs give the same gradient"


def check_groups(name: str) -> str:
    for rewards in VARIED:
        batch = random_batch((4, 3), rewards)
        together = gradient(name, batch)[1]
        for groups in (slice(0, 2), *(slice(g, g + 1) for g in range(4))):
            alone = gradient(name, batch.select(groups))[1]
            if _differ(alone, together[groups]):
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
        if _differ(first, second):
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
    if (rise > 0).all():
        return "they rise, at the anchor"
    if (rise < 0).all():
        return "they fall, at the anchor: is the sign right?"
    return f"they rise in {int((rise > 0).sum())} and fall in {int((rise < 0).sum())} of {len(rise)} groups"


def check_scale(name: str) -> str:
    own, apo = (_varied(loss, (8, 8), log_ratio="anchor").abs().mean().item() for loss in (name, "apo"))
    factor = own / apo
    if factor < 1e-9:
        return "zero at the anchor: a step that starts there trains nothing"
    finding = f"mean |c| at the anchor is {factor:.3g} x apo's at alpha 0.6"
    if 0.8 <= factor <= 1.25:
        return finding
    word, times = ("large", factor) if factor > 1 else ("small", 1 / factor)
    return f"{finding}: with SGD, apo's learning rate is {times:.3g} times too {word}; Adam cancels most of it"


def check_alpha(name: str) -> str:
    alphas = (0.2, 0.4, 0.6, 0.9)
    separate = [_varied(name, (4, 4), alpha=alpha) for alpha in alphas]
    if not any(_differ(separate[0], c) for c in separate[1:]):
        return "does not matter"
    try:
        together = _varied(name, (4, 4), alpha=torch.tensor(alphas, dtype=torch.float64))
        right = not _differ(together, torch.stack([c[:, g] for g, c in enumerate(separate)], dim=1))
    except LossError:
        right = False
    return "matters" if right else "matters, but not one per group as [G]: --apo.ess_scope group would be wrong"


CHECKS: dict[str, Callable[[str], str]] = {
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
    "alpha": check_alpha,
}
