"""alpha controllers: one step per optimizer step, from the batch's signals to alpha. Torch only, no Ray."""

from .controller import CONTROLLERS, AlphaController, alpha_controller, build_alpha_controller
from .ess import EssAlpha  # noqa: I001
from .fixed import FixedAlpha  # each registers its mode; in the order of --help and the docs
from .guarded import GuardedAlpha
from .signals import AlphaSignals

__all__ = [
    "CONTROLLERS",
    "AlphaController",
    "AlphaSignals",
    "EssAlpha",
    "FixedAlpha",
    "GuardedAlpha",
    "alpha_controller",
    "build_alpha_controller",
]
