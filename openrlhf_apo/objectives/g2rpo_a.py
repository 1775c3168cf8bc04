"""G2RPO-A: GRPO in which a share of each group starts from the beginning of a reference solution.

The loss is GRPO's, on the policy's own tokens. New is how answers are sampled (guidance.py). `--loss g2rpo_a` turns
this on, and `--guidance.enable` does for any other loss.

Reference: arXiv 2508.13023 and its public code.
"""

from dataclasses import dataclass

from .clip import ClippedSurrogate
from .grpo import KL
from .registry import token_loss


@token_loss("g2rpo_a")
@dataclass(eq=False)
class G2rpoA(ClippedSurrogate):
    aggregation = "sequence"

    @classmethod
    def presets(cls, max_new_tokens: int | None) -> dict[str, object]:
        return KL | {"guidance.enable": True}
