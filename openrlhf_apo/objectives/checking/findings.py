"""What the checks of both kinds of losses have in common."""

from typing import Any

from torch import Tensor

from openrlhf_apo.errors import LossError
from openrlhf_apo.objectives.registry import Loss
from openrlhf_apo.objectives.uses import Use

TOLERANCE = 1e-6  # of the largest |gradient|; wide enough for a loss that computes in float32


def watch(record: object) -> set[str]:
    """The fields of a context or a step that are read from now on; the set grows."""
    read: set[str] = set()
    kind: Any = type(record)

    class Watched(kind):
        def __getattribute__(self, field: str) -> Any:
            read.add(field)
            return super().__getattribute__(field)

    object.__setattr__(record, "__class__", Watched)  # it is frozen
    return read


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > TOLERANCE * max(a.abs().max().item(), b.abs().max().item())


def check_settings(kind: str, loss: Loss) -> str:
    try:
        loss()
    except Exception as error:  # your own code may check its settings, too
        raise LossError(f"{kind} loss {loss.name!r} cannot be built with its defaults: {error}") from None
    return ", ".join(f"{each.name} = {each.default}" for each in loss.settings) or "none"


def unread_uses(loss: Loss, uses: dict[str, Use], read: set[str], where: str) -> str:
    """read: the fields that the loss has read. where: of which it has read them."""
    unread = [use for use in sorted(loss.uses) if uses[use].field not in read]
    if unread:
        said = [
            f"{use} is declared, but {where}.{uses[use].field} is never read: {uses[use].unread}" for use in unread
        ]
        return f"{'; '.join(said)}; drop it from uses="
    return f"{', '.join(sorted(loss.uses))}: declared and read" if loss.uses else "none"


def scale(factor: float, measure: str, start: str, other: str, setting: str = "") -> str:
    """factor: the size of the loss's gradient over that of `other`, at the start."""
    if factor < 1e-9:
        return f"zero {start}: a step that starts there trains nothing"
    finding = f"mean |{measure}| {start} is {factor:.3g} x {other}'s{setting}"
    if 0.8 <= factor <= 1.25:
        return finding
    word, times = ("large", factor) if factor > 1 else ("small", 1 / factor)
    return f"{finding}: with SGD, {other}'s learning rate is {times:.3g} times too {word}; Adam cancels most of it"


def direction(rise: Tensor, start: str) -> str:
    """rise[any]: per group, how much a gradient step lifts the better answers above the others."""
    if (rise > 0).all():
        return f"they rise, {start}"
    if (rise < 0).all():
        return f"they fall, {start}: is the sign right?"
    return f"they rise in {int((rise > 0).sum())} and fall in {int((rise < 0).sum())} of {len(rise)} groups"
