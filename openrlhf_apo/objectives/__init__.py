"""The maths of group objectives: functions of [G, P] tensors, torch only, no Ray. G prompts, P completions each."""

from .apo import AlphaDivergenceLoss
from .diagnostics import ess, normalized_entropy
from .divergence import alpha_divergence
from .policy import anchored_log_policy
from .target import GroupTargetBuilder

__all__ = [
    "AlphaDivergenceLoss",
    "GroupTargetBuilder",
    "alpha_divergence",
    "anchored_log_policy",
    "ess",
    "normalized_entropy",
]
