"""Refuse, in one line that names the field, what would otherwise surface as a NaN far from its cause."""

import torch


def check_groups(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return `values[G, P]` in float64; raise ValueError if they are no groups, or not finite (naming the group)."""
    if values.dim() != 2 or values.shape[1] < 2:
        raise ValueError(f"{name} must have shape [G, P] with P >= 2 completions per group, got {list(values.shape)}")
    finite = values.isfinite().all(dim=-1)
    if not finite.all():
        group = int((~finite).nonzero()[0])
        raise ValueError(f"{name} of group {group} must be finite, got {values[group].tolist()}")
    return values.double()
