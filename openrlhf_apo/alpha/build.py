"""From a mode name and its settings to a controller."""

import inspect

from openrlhf_apo.objectives.checks import check_choice

from .controller import AlphaController
from .ess import EssAlpha
from .fixed import FixedAlpha
from .guarded import GuardedAlpha

CONTROLLERS = {"fixed": FixedAlpha, "guarded": GuardedAlpha, "ess": EssAlpha}


def build_alpha_controller(mode: str, **settings) -> AlphaController:
    """mode: "fixed", "guarded" or "ess". ValueError names another mode, a setting that mode lacks, or a bad value."""
    check_choice("alpha_mode", mode, CONTROLLERS)
    known = inspect.signature(CONTROLLERS[mode]).parameters
    for name in settings:
        if name not in known:
            raise ValueError(f"{name} is not a setting of alpha_mode {mode!r}, which takes {', '.join(known)}")
    return CONTROLLERS[mode](**settings)
