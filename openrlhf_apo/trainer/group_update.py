"""One rollout of a group objective: group maths here on the driver, coefficients to the policy.

The gradient of any group objective is linear in ∇ℓ_i, so for each optimizer step
    1. log_ratio[G, P] = ℓ − ℓ^anchor       a no-grad forward; skipped while θ is still the anchor, where it is 0
    2. α, q, c[G, P] = ∂D/∂log_ratio         float64, on whole groups
    3. θ ← step on Σ_i c_i ℓ_i / G           in any micro-batching, packing or sharding
which is exact because nothing that depends on a group ever happens inside a micro-batch.
"""

import math
from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor

from openrlhf_apo.alpha import AlphaSignals
from openrlhf_apo.objectives import (
    AlphaDivergenceLoss,
    GroupTargetBuilder,
    alpha_divergence,
    anchored_log_policy,
    ess,
    normalized_entropy,
)
from openrlhf_apo.trainer.handles import PolicyHandle, StepReport
from openrlhf_apo.trainer.samples import Sample, split_into_steps


class Anchor:
    """Which ℓ^anchor a step is compared with (DESIGN: rollout, lagged, ema, reference).

    `rollout` needs no second set of weights: every ℓ of the rollout is taken before its first update. The other
    three keep one beside the policy; `reference` never moves it.
    """

    def __init__(self, policy: PolicyHandle, mode: Literal["rollout", "lagged", "ema", "reference"], interval, beta):
        self.policy, self.mode, self.interval, self.beta = policy, mode, interval, beta

    def begin_rollout(self, rollout: int, num_steps: int) -> dict[int, Tensor]:
        """{step: ℓ^anchor[N]} of what must be known before the first update. `rollout` counts from 0."""
        if self.mode == "lagged" and rollout % self.interval == 0:
            self.policy.update_anchor(0.0)
        weights = "policy" if self._is_policy(rollout) else "anchor"
        if self.mode == "ema":
            return {}
        first = 1 if weights == "policy" else 0  # step 0 reports its own ℓ from the training forward
        return {step: self.policy.log_prob_sums(step, weights) for step in range(first, num_steps)}

    def is_current(self, rollout: int, update: int) -> bool:
        """Whether θ is still the anchor before the rollout's `update`-th optimizer step, so that log_ratio ≡ 0."""
        return update == 0 and self._is_policy(rollout)

    def after_update(self) -> None:
        if self.mode == "ema":
            self.policy.update_anchor(self.beta)

    def _is_policy(self, rollout: int) -> bool:
        return self.mode == "rollout" or (self.mode == "lagged" and rollout % self.interval == 0)


class GroupUpdate:
    """Trains a rollout by a group objective and reports its signals.

    reduction scales ℓ_i per sample: "sum" 1, "mean" 1/|y_i|, "const" 1/reduction_const (tokens).
    """

    def __init__(
        self,
        policy: PolicyHandle,
        anchor: Anchor,
        controller,
        target: GroupTargetBuilder,
        loss: AlphaDivergenceLoss,
        *,
        groups_per_step: int,
        epochs: int,
        reduction: Literal["sum", "mean", "const"] = "sum",
        reduction_const: float = 1.0,
        confidence: Literal["candidate", "relative", "token"] = "candidate",
        vocab_size: int,
        drop_zero_variance: bool = False,
    ):
        self.policy, self.anchor, self.controller = policy, anchor, controller
        self.target, self.loss = target, loss
        self.groups_per_step, self.epochs = groups_per_step, epochs
        self.reduction, self.reduction_const = reduction, reduction_const
        self.confidence, self.vocab_size = confidence, vocab_size
        self.drop_zero_variance = drop_zero_variance

    def run(self, groups: list[list[Sample]], rollout: int) -> dict:
        """Train on the rollout's whole groups. Returns the metrics of the last optimizer step, and every step's as
        lists under inner/<key>."""
        steps = split_into_steps(groups, self.groups_per_step)
        self.policy.load_steps([[sample for group in step for sample in group] for step in steps])
        anchor_sums = self.anchor.begin_rollout(rollout, len(steps))
        inner: dict[str, list] = defaultdict(list)
        for update in range(self.epochs * len(steps)):
            index = update % len(steps)
            metrics, report = self._step(steps[index], index, update, rollout, anchor_sums)
            if self.anchor.is_current(rollout, update):
                anchor_sums[index] = report.log_prob_sums
            self.anchor.after_update()
            for key, value in metrics.items():
                inner[key].append(value)
            if update == 0:
                mismatch = report.mismatch  # later updates have left the weights that sampled
        result = {key: values[-1] for key, values in inner.items()}
        result |= {f"inner/{key}": values for key, values in inner.items()}
        result["rollout_mismatch"] = mismatch
        return result

    def _step(self, groups, index: int, update: int, rollout: int, anchor_sums) -> tuple[dict, StepReport]:
        rewards = torch.tensor([[s.reward for s in group] for group in groups], dtype=torch.float64)  # [G, P]
        lengths = torch.tensor([[len(s.response_ids) for s in group] for group in groups], dtype=torch.float64)
        scale = self._scale(lengths)  # [G, P]
        if self.anchor.is_current(rollout, update):
            log_ratio = torch.zeros_like(rewards)
        else:
            current = self.policy.log_prob_sums(index)
            anchor = anchor_sums[index] if index in anchor_sums else self.policy.log_prob_sums(index, "anchor")
            log_ratio = (current - anchor).view_as(rewards) * scale

        log_q = self.target(rewards)  # [G, P]
        log_p = anchored_log_policy(log_ratio, self.loss.tau_anc)  # [G, P]
        varied = rewards.max(-1).values > rewards.min(-1).values  # [G]
        alpha = self.controller.step(
            AlphaSignals(
                mean_reward=rewards.mean().item(),
                confidence=self._confidence(groups, log_q, log_p, varied),
                log_q=log_q,
                log_p=log_p,
            )
        )
        coefficients = self.loss.coefficients(log_ratio, log_q, alpha) * scale / len(groups)  # ∂(mean D)/∂ Σ_t log π
        if self.drop_zero_variance:
            coefficients = coefficients * varied[:, None]
        report = self.policy.apply_coefficients(index, coefficients.flatten())

        tilt = torch.as_tensor(alpha, dtype=torch.float64).reshape(-1, 1) * (log_q - log_p)  # log r^α
        metrics = {
            "divergence": alpha_divergence(log_q, log_p, alpha).mean().item(),
            "entropy_p": normalized_entropy(log_p).mean().item(),
            "entropy_q": normalized_entropy(log_q).mean().item(),
            "max_weight": tilt.max().exp().item(),
            "zero_variance_fraction": 1.0 - varied.double().mean().item(),
            "log_ratio_std": log_ratio.std(-1, correction=0).mean().item(),
            "grad_norm": report.grad_norm,
            "lr": report.lr,
        }
        if varied.any():  # equal rewards weigh all answers alike, whatever α
            metrics["ess"] = (ess(tilt[varied]) / tilt.shape[-1]).mean().item()
        return metrics | self.controller.metrics, report

    def _scale(self, lengths: Tensor) -> Tensor:
        if self.reduction == "mean":
            return 1.0 / lengths
        return torch.full_like(lengths, 1.0 / self.reduction_const if self.reduction == "const" else 1.0)

    def _confidence(self, groups, log_q: Tensor, log_p: Tensor, varied: Tensor) -> float:
        """c_t of Eq. 19, or one of its two replacements (algorithms: `--apo.confidence`)."""
        if self.confidence == "token":  # −mean log π of the sampled tokens estimates the token entropy
            log_probs = [log_prob for group in groups for s in group for log_prob in s.rollout_log_probs]
            return 1.0 + sum(log_probs) / len(log_probs) / math.log(self.vocab_size)
        confidence = 1.0 - normalized_entropy(log_p)  # [G]
        if self.confidence == "candidate":
            return confidence.mean().item()
        if not varied.any():
            return 0.0
        target_confidence = 1.0 - normalized_entropy(log_q)
        return (confidence[varied] / target_confidence[varied]).clamp(0.0, 1.0).mean().item()
