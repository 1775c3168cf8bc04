"""Group objectives in the trainer: group maths here on the driver, one coefficient per sample to the policy.

The gradient of any group objective is linear in the gradients of l_i = log pi(y_i), so for each optimizer step
    1. log_ratio[G, P] = l - l^anchor       a no-grad forward; skipped while theta is still the anchor, where it is 0
    2. alpha, q, c[G, P] = dL/dlog_ratio    float64, on whole groups
    3. theta <- step on sum_i c_i l_i / G   in any micro-batching, packing or sharding
which is exact because nothing that depends on a group ever happens inside a micro-batch.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from openrlhf_apo.alpha import AlphaController, AlphaSignals
from openrlhf_apo.objectives import (
    AlphaDivergenceLoss,
    GroupContext,
    GroupTargetBuilder,
    Terms,
    alpha_divergence,
    anchored_log_policy,
    ess,
    normalized_entropy,
)
from openrlhf_apo.objectives.group_base import GroupLoss, coefficients
from openrlhf_apo.settings import Checked, setting
from openrlhf_apo.trainer.anchor import Anchor, AnchorSettings
from openrlhf_apo.trainer.handles import Behavior, PolicyHandle
from openrlhf_apo.trainer.step import Report, Step, per_group


@dataclass(frozen=True)
class GroupSettings(Checked):
    """How samples become l[G, P]."""

    reduction: Literal["sum", "mean", "const"] = setting(
        "sum", "log-prob of a sample: sum over tokens, per token, or over a constant", flag="apo.logprob_reduction"
    )
    reduction_const: float = setting(
        1024.0,
        "that constant, tokens",
        within="(0, inf)",
        flag="apo.logprob_const",
        needs=("reduction", ("const",)),
    )
    drop_zero_variance: bool = setting(
        False, "no gradient from groups of equal rewards", flag="apo.drop_zero_variance", uses="target"
    )


@dataclass(frozen=True)
class GroupPlan:
    """A group objective by value. controller: of alpha, None for a loss that has none. divergence: holds tau_anc and
    weight_clip, whatever the loss is. implementation: the registered loss, built with its settings."""

    loss: str
    implementation: GroupLoss | None = None
    controller: AlphaController | None = None
    target: GroupTargetBuilder = field(default_factory=GroupTargetBuilder)
    divergence: AlphaDivergenceLoss = field(default_factory=AlphaDivergenceLoss)
    settings: GroupSettings = field(default_factory=GroupSettings)
    anchor: AnchorSettings = field(default_factory=AnchorSettings)


class GroupObjective:
    def __init__(self, policy: PolicyHandle, plan: GroupPlan, vocab_size: int, behavior: Behavior = "policy"):
        self.policy, self.plan, self.vocab_size = policy, plan, vocab_size
        self.anchor = Anchor(policy, plan.anchor, behavior)
        self.controller = plan.controller

    def begin_rollout(self, rollout: int, num_steps: int) -> None:
        self.anchor.begin_rollout(rollout, num_steps)

    def terms(self, step: Step) -> Terms:
        plan, divergence = self.plan, self.plan.divergence
        scale = self._scale(step.lengths)  # [G, P]
        log_ratio = self._log_ratio(step) * scale  # [G, P]
        log_q = plan.target(step.rewards)  # [G, P]
        log_p = anchored_log_policy(log_ratio, divergence.tau_anc)  # [G, P]
        varied = step.rewards.max(-1).values > step.rewards.min(-1).values  # [G]
        metrics: dict[str, Any] = {
            "entropy_p": normalized_entropy(log_p).mean().item(),
            "entropy_q": normalized_entropy(log_q).mean().item(),
            "log_ratio_std": log_ratio.std(-1, correction=0).mean().item(),
        }
        alpha: float | Tensor = math.nan  # a loss without a controller declares no alpha, and cannot read it
        if self.controller is not None:
            alpha = self.controller.step(
                AlphaSignals(
                    mean_reward=step.rewards.mean().item(),
                    confidence=self._confidence(self.controller.confidence, step, log_q, log_p, varied),
                    log_q=log_q,
                    log_p=log_p,
                )
            )
            metrics |= _alpha_metrics(alpha, log_q, log_p, varied) | self.controller.metrics
        context = GroupContext(log_q, step.lengths, alpha, divergence.tau_anc, divergence.weight_clip)
        loss, c = coefficients(plan.loss, log_ratio, step.rewards, context, plan.implementation)  # [G], [G, P]
        metrics["loss"] = loss.mean().item()
        c = c * scale / len(step.groups)  # d(mean loss)/d sum_t log pi
        if plan.settings.drop_zero_variance:
            c = c * varied[:, None]
        return Terms({"log_prob": c.flatten()}, metrics=metrics)

    def after_update(self, step: Step, report: Report) -> dict:
        self.anchor.after_update(step.rollout, step.update, step.index, report.log_prob_sums)
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
        anchor = per_group(self.anchor.log_prob_sums(step.index), like=step.rewards)
        return per_group(self.policy.log_prob_sums(step.index, keep_graph=True), like=step.rewards) - anchor

    def _scale(self, lengths: Tensor) -> Tensor:
        settings = self.plan.settings
        if settings.reduction == "mean":
            return 1.0 / lengths
        return torch.full_like(lengths, 1.0 / settings.reduction_const if settings.reduction == "const" else 1.0)

    def _confidence(self, source: str, step: Step, log_q: Tensor, log_p: Tensor, varied: Tensor) -> float:
        """c_t of Eq. 19, or one of its two replacements (AlphaController.confidence)."""
        if source == "token":  # -mean log pi of the sampled tokens estimates the token entropy
            log_probs = [log_prob for sample in step.samples for log_prob in sample.own_log_probs]
            return 1.0 + sum(log_probs) / len(log_probs) / math.log(self.vocab_size)
        confidence = 1.0 - normalized_entropy(log_p)  # [G]
        if source == "candidate":
            return confidence.mean().item()
        if not varied.any():
            return 0.0
        target_confidence = 1.0 - normalized_entropy(log_q)
        return (confidence[varied] / target_confidence[varied]).clamp(0.0, 1.0).mean().item()


LARGEST_LOG = 700.0  # whose exp is still a float64


def _alpha_metrics(alpha: float | Tensor, log_q: Tensor, log_p: Tensor, varied: Tensor) -> dict[str, float]:
    tilt = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1) * (log_q - log_p)  # log r^alpha, [G, P]
    metrics = {
        "divergence": alpha_divergence(log_q, log_p, alpha).mean().item(),
        "max_weight": tilt.max().clamp(max=LARGEST_LOG).exp().item(),
    }
    if varied.any():  # equal rewards weigh all answers alike, whatever alpha
        metrics["ess"] = (ess(tilt[varied]) / tilt.shape[-1]).mean().item()
    return metrics
