"""The guarded schedule: leave the mass-covering alpha_max only when confidence *and* reward rise.

    p_t = max(0, tanh((R_t - b_(t-1)) / s_R))                  improvement over the baseline     (20)
    b_t = (1 - lam) b_(t-1) + lam R_t                          baseline
    a_t = alpha_max - (alpha_max - alpha_min) c_t p_t          c_t: confidence                   (22)
    alpha_t = (1 - rho) alpha_(t-1) + rho a_t                  alpha_0 = alpha_max               (23)

Reference: APO, arXiv 2512.22953, the paper's "legacy adaptive"; defaults are its values. The paper leaves two things
open:

b_0: the paper has zero, which makes the first reward an improvement. baseline_init="first" starts at the first R_t,
"paper" at zero.

s_R: the paper says "0.5, then a running std", without a formula. reward_scale_mode="running" keeps the exponentially
weighted deviation of R_t from the same baseline, s_t^2 = (1 - lam) (s_(t-1)^2 + lam (R_t - b_(t-1))^2), from
s_0 = reward_scale. Baseline and scale have one memory, so a reward that rises slowly does not make its scale large.
"fixed" keeps s_0. A step is judged by b and s_R of the steps before it.
"""

import math
from dataclasses import dataclass
from typing import Literal

from openrlhf_apo.settings import setting

from .controller import BoundedAlpha, Confidence, alpha_controller
from .signals import AlphaSignals

MIN_REWARD_SCALE = 1e-8  # a reward that never changes shrinks s_R towards zero, and (20) divides by it


@alpha_controller("guarded")
@dataclass(eq=False)
class GuardedAlpha(BoundedAlpha):
    lam: float = setting(0.1, "weight of the new reward in the baseline b_t", within="(0, 1)", flag="apo.lam")
    reward_scale: float = setting(
        0.5,
        "s_0, the scale of an improvement, in units of reward (Eq. 20)",
        within="(0, inf)",
        flag="apo.reward_scale",
    )
    reward_scale_mode: Literal["running", "fixed"] = setting(
        "running", "s_R: a running deviation from the baseline, or s_0", flag="apo.reward_scale_mode"
    )
    baseline_init: Literal["first", "paper"] = setting(
        "first", "b_0: the first reward, or 0 as printed", flag="apo.baseline_init"
    )
    confidence: Confidence = setting(
        "candidate",
        "c_t: 1 - H(p)/log P (Eq. 19); that over the target's own; or 1 - token entropy / log V",
        flag="apo.confidence",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state = {
            "alpha": self.alpha_max,
            "reward_baseline": 0.0 if self.baseline_init == "paper" else None,
            "reward_scale": self.reward_scale,
        }

    def step(self, signals: AlphaSignals) -> float:
        """Needs mean_reward and confidence. `metrics` holds the baseline and the scale that judged this step."""
        alpha, baseline, scale = (self._state[key] for key in ("alpha", "reward_baseline", "reward_scale"))
        if baseline is None:
            baseline = signals.mean_reward
        confidence = min(max(signals.confidence, 0.0), 1.0)  # measured in float32, it may miss [0, 1] by a rounding
        surprise = signals.mean_reward - baseline
        improvement = max(0.0, math.tanh(surprise / scale))

        target = self.alpha_max - (self.alpha_max - self.alpha_min) * confidence * improvement
        alpha += self.rho * (target - alpha)
        self.metrics = {
            "alpha": alpha,
            "confidence": confidence,
            "improvement": improvement,
            "reward_baseline": baseline,
            "reward_scale": scale,
        }

        baseline += self.lam * surprise
        if self.reward_scale_mode == "running":
            scale = max(math.sqrt((1 - self.lam) * (scale**2 + self.lam * surprise**2)), MIN_REWARD_SCALE)
        self._state = {"alpha": alpha, "reward_baseline": baseline, "reward_scale": scale}
        return alpha
