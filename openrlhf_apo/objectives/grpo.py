"""GRPO: PPO's clipped surrogate with the z-score of the group as advantage.

    L = -1/N sum_i 1/|y_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta KL_it ]
    A_i = (R_i - mean R) / std R,   KL_it = KL_it(pi || pi_ref)

Reference: DeepSeekMath, arXiv 2402.03300, Eq. 3. Its KL has beta = 0.04 and the k3 estimator; here it is the trainer's
`--algo.kl.*`. eps = 0.2 is PPO's. std is the sample one (1/(P-1)), as in OpenRLHF, TRL and verl.
"""

from dataclasses import dataclass

from .clip import ClippedSurrogate
from .registry import token_loss

KL: dict[str, object] = {"algo.kl.init_coef": 0.04, "algo.kl.use_loss": True}


@token_loss("grpo")
@dataclass(eq=False)
class Grpo(ClippedSurrogate):
    aggregation = "sequence"

    @classmethod
    def presets(cls, max_new_tokens: int | None) -> dict[str, object]:
        return KL
