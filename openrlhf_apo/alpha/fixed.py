"""A constant alpha. Reference: the fixed arm of APO, arXiv 2512.22953; its value, 0.6, is the default."""

from dataclasses import dataclass

from openrlhf_apo.objectives.checks import check_number

from .controller import AlphaController
from .signals import AlphaSignals


@dataclass(eq=False)
class FixedAlpha(AlphaController):
    """alpha in [0, 1]; the ends are the KL limits."""

    alpha: float = 0.6

    def __post_init__(self):
        check_number("alpha", self.alpha, "[0, 1]")
        self._state = {}
        self.metrics = {}

    def step(self, signals: AlphaSignals) -> float:
        self.metrics = {"alpha": self.alpha}
        return self.alpha
