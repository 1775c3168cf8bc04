"""A constant alpha. Reference: the fixed arm of APO, arXiv 2512.22953; its value, 0.6, is the default."""

from dataclasses import dataclass

from openrlhf_apo.settings import setting

from .controller import AlphaController, alpha_controller
from .signals import AlphaSignals


@alpha_controller("fixed")
@dataclass(eq=False)
class FixedAlpha(AlphaController):
    """alpha in [0, 1]; the ends are the KL limits."""

    alpha: float = setting(0.6, "alpha", within="[0, 1]", flag="apo.alpha")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state = {}
        self.metrics = {}

    def step(self, signals: AlphaSignals) -> float:
        self.metrics = {"alpha": self.alpha}
        return self.alpha
