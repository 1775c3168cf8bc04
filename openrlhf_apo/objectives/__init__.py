"""The maths of objectives: functions of tensors, torch only, no Ray. G prompts, P completions each."""

from . import adpo_pairwise, adpo_plackett_luce, adpo_softmax  # noqa: F401  (each registers its loss)
from .adrpo import Adrpo
from .alpha_ppo import AlphaPpo
from .apo import AlphaDivergenceLoss
from .bapo import Bapo
from .cispo import Cispo
from .dapo import Dapo
from .diagnostics import ess, normalized_entropy
from .divergence import alpha_divergence
from .dr_grpo import DrGrpo
from .g2rpo_a import Guidance
from .group_loss import GROUP_LOSSES, GroupContext, LossError, group_loss
from .grpo import Grpo
from .gspo import Gspo
from .gtpo import Gtpo
from .policy import anchored_log_policy
from .target import GroupTargetBuilder
from .token_loss import TokenLoss, TokenStep, TokenTerms

TOKEN_LOSSES: dict[str, type[TokenLoss]] = {
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "dapo": Dapo,
    "gspo": Gspo,
    "cispo": Cispo,
    "gtpo": Gtpo,
    "bapo": Bapo,
    "alpha_ppo": AlphaPpo,
    "g2rpo_a": Grpo,  # its own part is how samples are made: Guidance
}

__all__ = [
    "GROUP_LOSSES",
    "TOKEN_LOSSES",
    "Adrpo",
    "AlphaDivergenceLoss",
    "GroupContext",
    "GroupTargetBuilder",
    "Guidance",
    "LossError",
    "TokenLoss",
    "TokenStep",
    "TokenTerms",
    "alpha_divergence",
    "anchored_log_policy",
    "ess",
    "group_loss",
    "normalized_entropy",
]
