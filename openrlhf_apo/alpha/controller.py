"""What every controller has: a step, the metrics of the last step, and a state that fits in a JSON checkpoint.

    @alpha_controller("mine")
    @dataclass(eq=False)
    class MyAlpha(AlphaController):
        speed: float = setting(0.1, "how fast it moves", within="(0, 1]")     # --mine.speed

        def step(self, signals): ...

registers `--alpha_mode mine`. CONTRIBUTING.md shows a whole one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, TypeVar

import torch

from openrlhf_apo.errors import LossError
from openrlhf_apo.settings import Checked, check_choice, setting, settings_of

from .signals import AlphaSignals

Confidence = Literal["candidate", "relative", "token"]
CONTROLLERS: "dict[str, type[AlphaController]]" = {}


class AlphaController(Checked):
    """Base of the controllers. `_state` holds all that survives a checkpoint: numbers by name, the same names after
    every step. `metrics` holds what the last step logs.

    confidence: which c_t the signals hold. "candidate": 1 - H(p)/log P (Eq. 19). "relative": that, divided by the same
    for the target. "token": 1 - token entropy / log V.
    """

    confidence: str = "candidate"
    _state: dict[str, Any]  # JSON-able
    metrics: dict[str, float | str | dict[str, int]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state, self.metrics = {}, {}

    def step(self, signals: AlphaSignals) -> float | torch.Tensor:
        """alpha of this optimizer step: a float in [0, 1], or one per group [G]. Updates `metrics` and `_state`."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Go on exactly where `state_dict` was taken. ValueError if another kind of controller wrote it."""
        if set(state) != set(self._state):
            raise ValueError(
                f"alpha state has {sorted(state)}, {type(self).__name__} needs {sorted(self._state)}: "
                "resume with the alpha_mode that wrote the checkpoint"
            )
        self._state = dict(state)


@dataclass(eq=False)
class BoundedAlpha(AlphaController):
    """Base of the controllers that move alpha: 0 < alpha_min < alpha_max < 1, and the smoothing of Eq. 23."""

    alpha_max: float = setting(0.9, "upper bound of alpha, and its start", within="(0, 1)", flag="apo.alpha_max")
    alpha_min: float = setting(0.35, "lower bound of alpha", within="(0, 1)", flag="apo.alpha_min")
    rho: float = setting(
        0.1, "weight of the new alpha in its moving average (Eq. 23); 1 is none", within="(0, 1]", flag="apo.rho"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha_min >= self.alpha_max:
            raise ValueError(
                f"alpha_min must be below alpha_max, got alpha_min={self.alpha_min}, alpha_max={self.alpha_max}"
            )


C = TypeVar("C", bound=type[AlphaController])


def alpha_controller(name: str) -> Callable[[C], C]:
    """Register a dataclass derived from AlphaController as `--alpha_mode NAME`.

    Raises LossError for a name that is taken or cannot be a flag, and for another kind of class.
    """

    def register(controller: C) -> C:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise LossError(f"alpha controller name {name!r}: use letters, digits and underscores")
        if name in CONTROLLERS:
            raise LossError(f"alpha controller {name!r} exists already: choose another name")
        if not (isinstance(controller, type) and issubclass(controller, AlphaController)):
            raise LossError(f"alpha controller {name!r} must be a class derived from AlphaController")
        if not is_dataclass(controller):
            raise LossError(f"alpha controller {name!r}: put @dataclass(eq=False) right above its class")
        settings_of(controller)  # TypeError for a setting that can have no flag
        CONTROLLERS[name] = controller
        return controller

    return register


def build_alpha_controller(mode: str, **settings: Any) -> AlphaController:
    """A controller by its name. ValueError for a mode that does not exist, a setting that it lacks, or a bad value."""
    check_choice("alpha_mode", mode, CONTROLLERS)
    controller: type = CONTROLLERS[mode]  # mypy takes a narrower type to be unhashable
    known = [each.name for each in settings_of(controller)]
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is not a setting of alpha_mode {mode!r}, which takes {', '.join(known)}")
    return controller(**settings)
