"""What every controller has: a step, the metrics of the last step, and a state that fits in a JSON checkpoint."""

import torch

from openrlhf_apo.objectives.checks import check_number

from .signals import AlphaSignals


class AlphaController:
    """Base of the controllers. `_state` holds all that survives a checkpoint, `metrics` what the last step logged."""

    _state: dict[str, float | None]
    metrics: dict[str, float | str | dict[str, int]]

    def step(self, signals: AlphaSignals) -> float | torch.Tensor:
        """Return alpha for this optimizer step, and update `metrics` and the state."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, float | None]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Continue exactly where `state_dict` was taken; ValueError if another kind of controller wrote it."""
        if set(state) != set(self._state):
            raise ValueError(
                f"alpha state has {sorted(state)}, {type(self).__name__} needs {sorted(self._state)}: "
                "resume with the alpha_mode that wrote the checkpoint"
            )
        self._state = dict(state)


def check_bounds(alpha_max: float, alpha_min: float) -> None:
    """Raise ValueError unless 0 < alpha_min < alpha_max < 1."""
    check_number("alpha_max", alpha_max, "(0, 1)")
    check_number("alpha_min", alpha_min, "(0, 1)")
    if alpha_min >= alpha_max:
        raise ValueError(f"alpha_min must be below alpha_max, got alpha_min={alpha_min}, alpha_max={alpha_max}")
