"""alpha controllers: one step per optimizer step, from the batch's signals to alpha. Torch only, no Ray."""

from .build import build_alpha_controller
from .ess import EssAlpha
from .fixed import FixedAlpha
from .guarded import GuardedAlpha
from .signals import AlphaSignals

__all__ = ["AlphaSignals", "EssAlpha", "FixedAlpha", "GuardedAlpha", "build_alpha_controller"]
