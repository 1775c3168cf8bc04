"""DAPO: GRPO with a higher upper clip and a mean over tokens.

    L = -1/(sum_i |y_i|) sum_i sum_t min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)

eps_low = 0.2, eps_high = 0.28. The trainer has its other two parts, and `--loss dapo` turns both on: groups of equal
rewards are sampled anew (`--algo.dynamic_filtering_enable`), and answers that come near the length limit lose reward
(`--reward.overlong_buffer_len`; the paper has 4096 of 20480 tokens, a fifth). No KL.

Reference: arXiv 2503.14476, Eqs. 8-13.
"""

from dataclasses import dataclass

from .clip import ClippedSurrogate
from .registry import token_loss

OVERLONG_SHARE = 0.2  # of the length limit


@token_loss("dapo", uses=("max_length",))
@dataclass(eq=False)
class Dapo(ClippedSurrogate):
    eps_high: float = 0.28

    aggregation = "token"

    @classmethod
    def presets(cls, max_new_tokens: int | None) -> dict[str, object]:
        presets: dict[str, object] = {"algo.dynamic_filtering_enable": True}
        if max_new_tokens:
            presets["reward.overlong_buffer_len"] = OVERLONG_SHARE * max_new_tokens
        return presets
