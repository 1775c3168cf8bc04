"""Refuse bad numbers where they come in, in one line that names the field. Later they would be a NaN far away."""

import torch


def check_groups(name: str, values: torch.Tensor) -> torch.Tensor:
    """values[G, P] in float64. ValueError for another shape, for P < 2, and, naming the group, for a value that is not
    finite."""
    if values.dim() != 2 or values.shape[1] < 2:
        raise ValueError(f"{name} must have shape [G, P] with P >= 2 completions per group, got {list(values.shape)}")
    finite = values.isfinite().all(dim=-1)
    if not finite.all():
        group = int((~finite).nonzero()[0])
        raise ValueError(f"{name} of group {group} must be finite, got {values[group].tolist()}")
    return values.double()
