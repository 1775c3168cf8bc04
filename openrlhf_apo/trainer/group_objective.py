"""Group objectives in the trainer: group maths here on the driver, one coefficient per sample to the policy.

The gradient of any group objective is linear in the gradients of l_i = log pi(y_i), so for each optimizer step
    1. log_ratio[G, P] = l - l^anchor       a no-grad forward; skipped while theta is still the anchor, where it is 0
    2. alpha, q, c[G, P] = dL/dlog_ratio    float64, on whole groups
    3. theta <- step on sum_i c_i l_i / G   in any micro-batching, packing or sharding
which is exact because nothing that depends on a group ever happens inside a micro-batch.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from openrlhf_apo.alpha import AlphaSignals
from openrlhf_apo.alpha.controller import AlphaController
from openrlhf_apo.objectives import (
    GroupContext,
    GroupTargetBuilder,
    alpha_divergence,
    anchored_log_policy,
    ess,
    normalized_entropy,
)
from openrlhf_apo.objectives.group_loss import coefficients
from openrlhf_apo.trainer.handles import PolicyHandle
from openrlhf_apo.trainer.step import Step, StepReport, StepTerms


class Anchor:
    """Which l^anchor a step is compared with: rollout, lagged, ema or reference.

    `rollout` needs no second set of weights: every l of the rollout is taken before its first update. The other
    three keep one beside the policy; `reference` never moves it.
    """

    def __init__(self, policy: PolicyHandle, mode: Literal["rollout", "lagged", "ema", "reference"], interval, beta):
        self.policy, self.mode, self.interval, self.beta = policy, mode, interval, beta

    def begin_rollout(self, rollout: int, num_steps: int) -> dict[int, Tensor]:
        """{step: l^anchor[N]} of what must be known before the first update. `rollout` counts from 0."""
        if self.mode == "lagged" and rollout % self.interval == 0:
            self.policy.update_anchor(0.0)
        weights = "policy" if self._is_policy(rollout) else "anchor"
        if self.mode == "ema":
            return {}
        first = 1 if weights == "policy" else 0  # step 0 reports its own l from the training forward
        return {step: self.policy.log_prob_sums(step, weights) for step in range(first, num_steps)}

    def is_current(self, rollout: int, update: int) -> bool:
        """Whether theta is still the anchor before the rollout's `update`-th optimizer step: log_ratio is 0."""
        return update == 0 and self._is_policy(rollout)

    def after_update(self) -> None:
        if self.mode == "ema":
            self.policy.update_anchor(self.beta)

    def _is_policy(self, rollout: int) -> bool:
        return self.mode == "rollout" or (self.mode == "lagged" and rollout % self.interval == 0)


class GroupObjective:
    """loss: a registered group loss. controller: of alpha, or None for a loss that has none.

    reduction scales l_i per sample: "sum" 1, "mean" 1/|y_i|, "const" 1/reduction_const (tokens).
    """

    def __init__(
        self,
        policy: PolicyHandle,
        anchor: Anchor,
        loss: str,
        controller: AlphaController | None,
        target: GroupTargetBuilder,
        *,
        tau_anc: float = 0.8,
        weight_clip: tuple[float, float] | None = None,
        reduction: Literal["sum", "mean", "const"] = "sum",
        reduction_const: float = 1.0,
        confidence: Literal["candidate", "relative", "token"] = "candidate",
        vocab_size: int,
        drop_zero_variance: bool = False,
    ):
        self.policy, self.anchor, self.loss, self.controller, self.target = policy, anchor, loss, controller, target
        self.tau_anc, self.weight_clip = tau_anc, weight_clip
        self.reduction, self.reduction_const = reduction, reduction_const
        self.confidence, self.vocab_size = confidence, vocab_size
        self.drop_zero_variance = drop_zero_variance
        self.anchor_sums: dict[int, Tensor] = {}

    def begin_rollout(self, rollout: int, num_steps: int) -> None:
        self.anchor_sums = self.anchor.begin_rollout(rollout, num_steps)

    def terms(self, step: Step) -> tuple[StepTerms, dict]:
        scale = self._scale(step.lengths)  # [G, P]
        log_ratio = self._log_ratio(step) * scale  # [G, P]
        log_q = self.target(step.rewards)  # [G, P]
        log_p = anchored_log_policy(log_ratio, self.tau_anc)  # [G, P]
        varied = step.rewards.max(-1).values > step.rewards.min(-1).values  # [G]
        alpha = 1.0  # of no effect on a loss without a controller
        metrics = {
            "entropy_p": normalized_entropy(log_p).mean().item(),
            "entropy_q": normalized_entropy(log_q).mean().item(),
            "log_ratio_std": log_ratio.std(-1, correction=0).mean().item(),
        }
        if self.controller is not None:
            alpha = self.controller.step(
                AlphaSignals(
                    mean_reward=step.rewards.mean().item(),
                    confidence=self._confidence(step, log_q, log_p, varied),
                    log_q=log_q,
                    log_p=log_p,
                )
            )
            metrics |= _alpha_metrics(alpha, log_q, log_p, varied) | self.controller.metrics
        context = GroupContext(log_q, step.lengths, alpha, self.tau_anc, self.weight_clip)
        loss, c = coefficients(self.loss, log_ratio, step.rewards, context)  # [G], [G, P]
        metrics["loss"] = loss.mean().item()
        c = c * scale / len(step.groups)  # d(mean loss)/d sum_t log pi
        if self.drop_zero_variance:
            c = c * varied[:, None]
        return StepTerms({"log_prob": c.flatten()}), metrics

    def after_update(self, step: Step, report: StepReport) -> dict:
        if self.anchor.is_current(step.rollout, step.update):
            self.anchor_sums[step.index] = report.log_prob_sums
        self.anchor.after_update()
        return {}

    def state_dict(self) -> dict:
        return self.controller.state_dict() if self.controller is not None else {}

    def load_state_dict(self, state: dict) -> None:
        if self.controller is not None:
            self.controller.load_state_dict(state)

    def _log_ratio(self, step: Step) -> Tensor:
        """l - l^anchor [G, P], nats."""
        if self.anchor.is_current(step.rollout, step.update):
            return torch.zeros_like(step.rewards)
        current = self.policy.log_prob_sums(step.index)
        if step.index in self.anchor_sums:
            anchor = self.anchor_sums[step.index]
        else:
            anchor = self.policy.log_prob_sums(step.index, "anchor")
        return (current - anchor).view_as(step.rewards)

    def _scale(self, lengths: Tensor) -> Tensor:
        if self.reduction == "mean":
            return 1.0 / lengths
        return torch.full_like(lengths, 1.0 / self.reduction_const if self.reduction == "const" else 1.0)

    def _confidence(self, step: Step, log_q: Tensor, log_p: Tensor, varied: Tensor) -> float:
        """c_t of Eq. 19, or one of its two replacements (`--apo.confidence`)."""
        if self.confidence == "token":  # -mean log pi of the sampled tokens estimates the token entropy
            log_probs = [log_prob for sample in step.samples for log_prob in sample.rollout_log_probs]
            return 1.0 + sum(log_probs) / len(log_probs) / math.log(self.vocab_size)
        confidence = 1.0 - normalized_entropy(log_p)  # [G]
        if self.confidence == "candidate":
            return confidence.mean().item()
        if not varied.any():
            return 0.0
        target_confidence = 1.0 - normalized_entropy(log_q)
        return (confidence[varied] / target_confidence[varied]).clamp(0.0, 1.0).mean().item()


def _alpha_metrics(alpha, log_q: Tensor, log_p: Tensor, varied: Tensor) -> dict[str, float]:
    tilt = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1) * (log_q - log_p)  # log r^alpha, [G, P]
    metrics = {
        "divergence": alpha_divergence(log_q, log_p, alpha).mean().item(),
        "max_weight": tilt.max().exp().item(),
    }
    if varied.any():  # equal rewards weigh all answers alike, whatever alpha
        metrics["ess"] = (ess(tilt[varied]) / tilt.shape[-1]).mean().item()
    return metrics
