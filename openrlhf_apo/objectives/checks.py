"""Refuse, in one line that names the field, what would otherwise surface as a NaN far from its cause."""

from collections.abc import Iterable

import torch


def check_number(name: str, value: float, interval: str) -> None:
    """Raise ValueError unless `value` is a number in `interval`, written as in a textbook: "(0, 1]", "[0, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (low <= value if interval[0] == "[" else low < value)
        and (value <= high if interval[-1] == "]" else value < high)
    )
    if not inside:
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_groups(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return `values[G, P]` in float64; raise ValueError if they are no groups, or not finite (naming the group)."""
    if values.dim() != 2 or values.shape[1] < 2:
        raise ValueError(f"{name} must have shape [G, P] with P >= 2 completions per group, got {list(values.shape)}")
    finite = values.isfinite().all(dim=-1)
    if not finite.all():
        group = int((~finite).nonzero()[0])
        raise ValueError(f"{name} of group {group} must be finite, got {values[group].tolist()}")
    return values.double()
