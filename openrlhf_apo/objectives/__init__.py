"""The maths of objectives: functions of tensors, torch only, no Ray. G prompts, P completions each."""

# To import a loss registers it. The order is that of --help and the docs.
from . import apo, adpo_softmax, adpo_plackett_luce, adpo_pairwise  # noqa: F401, I001
from . import grpo, dr_grpo, dapo, gspo, cispo, gtpo, bapo, alpha_ppo, g2rpo_a  # noqa: F401
from .adrpo import Adrpo
from .apo import AlphaDivergenceLoss
from .correction import RolloutCorrection
from .clip import ClippedLoss, ClippedSurrogate, clipped_surrogate, ratio
from .diagnostics import ess, normalized_entropy
from .divergence import alpha_divergence
from .group_base import GroupContext
from .guidance import Guidance
from .policy import anchored_log_policy
from .registry import GROUP_LOSSES, OPENRLHF, TOKEN_LOSSES, Loss, group_loss, token_loss
from .target import GroupTargetBuilder
from .terms import Terms
from .token_base import TokenLoss, TokenStep, group_z_score

__all__ = [
    "GROUP_LOSSES",
    "OPENRLHF",
    "TOKEN_LOSSES",
    "Adrpo",
    "AlphaDivergenceLoss",
    "ClippedLoss",
    "ClippedSurrogate",
    "GroupContext",
    "GroupTargetBuilder",
    "Guidance",
    "Loss",
    "RolloutCorrection",
    "Terms",
    "TokenLoss",
    "TokenStep",
    "alpha_divergence",
    "anchored_log_policy",
    "clipped_surrogate",
    "ess",
    "group_loss",
    "group_z_score",
    "normalized_entropy",
    "ratio",
    "token_loss",
]
