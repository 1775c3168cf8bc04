"""What a controller may look at."""

from dataclasses import dataclass

import torch

from openrlhf_apo.settings import check_number


@dataclass(frozen=True, eq=False)
class AlphaSignals:
    """One optimizer step, seen from the controllers.

    mean_reward: R_t, over all sequences of the step, in units of reward. confidence: c_t in [0, 1], as
    `AlphaController.confidence` says. log_q, log_p: [G, P], target and anchored policy of the groups of the step.
    ValueError unless both numbers are finite floats.
    """

    mean_reward: float
    confidence: float
    log_q: torch.Tensor | None = None
    log_p: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_number("mean_reward", self.mean_reward, "(-inf, inf)")
        check_number("confidence", self.confidence, "(-inf, inf)")
