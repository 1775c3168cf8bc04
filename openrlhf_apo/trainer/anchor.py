"""Which l^anchor an optimizer step is compared with."""

from dataclasses import dataclass
from typing import Literal

from openrlhf_apo.settings import Checked, setting
from openrlhf_apo.trainer.handles import Behavior, PolicyHandle


@dataclass(frozen=True)
class AnchorSettings(Checked):
    mode: Literal["rollout", "lagged", "ema", "reference"] = setting(
        "rollout",
        "what log-ratios compare with: the policy that made the rollout, or older weights",
        flag="apo.anchor",
    )
    interval: int = setting(
        4,
        "rollouts between refreshes of the lagged anchor",
        within="[1, inf)",
        flag="apo.anchor_interval",
        needs=("mode", ("lagged",)),
    )
    beta: float = setting(
        0.99,
        "share of the old ema anchor kept per optimizer step",
        within="(0, 1)",
        flag="apo.anchor_beta",
        needs=("mode", ("ema",)),
    )

    @property
    def has_weights(self) -> bool:
        """Whether the anchor is a second set of weights beside the policy's."""
        return self.mode != "rollout"

    @property
    def always_on_policy(self) -> bool:
        """Whether theta is the anchor at the start of every rollout."""
        return self.mode == "rollout" or (self.mode == "lagged" and self.interval == 1)


class Anchor:
    """l^anchor of the steps of a rollout.

    `rollout` needs no second set of weights where the policy itself has sampled: every l of the rollout is taken
    before its first update. The other three keep one beside the policy; `reference` never moves it.
    """

    def __init__(self, policy: PolicyHandle, settings: AnchorSettings, behavior: Behavior = "policy"):
        self.policy, self.settings, self.behavior = policy, settings, behavior
        self.sums: dict[int, list[float]] = {}  # step -> l^anchor[N], for those known by now

    def begin_rollout(self, rollout: int, num_steps: int) -> None:
        """Take what must be known before the first update. `rollout` counts from 0."""
        mode, self.sums = self.settings.mode, {}
        if mode == "lagged" and rollout % self.settings.interval == 0:
            self.policy.update_anchor(0.0)
        if mode == "ema":
            return  # it moves after every update
        on_policy = self._is_policy(rollout)
        weights: Behavior = "policy" if on_policy else self.behavior if mode == "rollout" else "anchor"
        first = 1 if on_policy else 0  # step 0 reports its own l from the training forward
        self.sums = {step: self.policy.log_prob_sums(step, weights) for step in range(first, num_steps)}

    def is_current(self, rollout: int, update: int) -> bool:
        """Whether theta is still the anchor before the rollout's `update`-th optimizer step: log_ratio is 0."""
        return update == 0 and self._is_policy(rollout)

    def log_prob_sums(self, step: int) -> list[float]:
        """l^anchor[N] of a step, nats."""
        return self.sums[step] if step in self.sums else self.policy.log_prob_sums(step, "anchor")

    def after_update(self, rollout: int, update: int, step: int, log_prob_sums: list[float]) -> None:
        """log_prob_sums[N]: of the training forward."""
        if self.is_current(rollout, update):
            self.sums[step] = log_prob_sums
        if self.settings.mode == "ema":
            self.policy.update_anchor(self.settings.beta)

    def _is_policy(self, rollout: int) -> bool:
        mode, interval = self.settings.mode, self.settings.interval
        if mode == "rollout":
            return self.behavior == "policy"
        return mode == "lagged" and rollout % interval == 0
