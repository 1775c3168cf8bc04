"""One rollout of any objective: whole groups to optimizer steps, numbers per sample to the policy.

The gradient of every objective here is a sum over samples once the driver, which knows all of a group and of a step,
has done what concerns more than one sample: targets, alpha, advantages, normalisers (objectives/terms.py). Ranks add
their samples up in any micro-batching, packing or sharding, and the step is the same.
"""

from collections import defaultdict
from typing import Protocol

import torch

from openrlhf_apo.objectives import RolloutCorrection, Terms
from openrlhf_apo.trainer.handles import Behavior, PolicyHandle
from openrlhf_apo.trainer.length_penalty import LengthPenalty
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.samples import Sample, split_into_steps
from openrlhf_apo.trainer.step import Report, Step


class Objective(Protocol):
    """group_objective.py and token_objective.py."""

    def begin_rollout(self, rollout: int, num_steps: int) -> None:
        """Before the first optimizer step, with the rollout's samples loaded."""

    def terms(self, step: Step) -> Terms:
        """What the ranks are to compute, and the metrics of the step."""

    def after_update(self, step: Step, report: Report) -> dict:
        """After the optimizer step; further metrics."""


class Update:
    """Trains a rollout and reports its signals."""

    def __init__(
        self,
        policy: PolicyHandle,
        objective: Objective,
        *,
        groups_per_step: int,
        epochs: int,
        regularizer: Regularizer | None = None,
        length_penalty: LengthPenalty | None = None,
        correction: RolloutCorrection | None = None,
        behavior: Behavior = "policy",
    ):
        self.policy, self.objective = policy, objective
        self.groups_per_step, self.epochs = groups_per_step, epochs
        self.regularizer = regularizer or Regularizer()
        self.length_penalty = length_penalty or LengthPenalty()
        self.correction, self.behavior = correction, behavior
        self.staleness = 0  # optimizer steps since the policy that sampled the next rollout

    def run(self, groups: list[list[Sample]], rollout: int) -> dict:
        """Train on the rollout's whole groups. Returns the metrics of the last optimizer step, but for
        `zero_variance_fraction`, which is the rollout's; every step's as lists under inner/<key>; and
        `first_advantages`, of the first group's samples, where the objective has such.

        With asynchronous training the current policy is sampling the next rollout. One that is left without groups is
        handed over, too, so that the policy is known when the next is trained on, and a lagged anchor moves on."""
        if not groups:
            self.objective.begin_rollout(rollout, 0)
            self._keep_behavior(0)
            return {}
        steps = split_into_steps(groups, self.groups_per_step)
        self.policy.load_steps([[sample for group in step for sample in group] for step in steps])
        self.objective.begin_rollout(rollout, len(steps))
        if self.correction is not None or self.regularizer.unbiased_gradient:
            first = 1 if self.behavior == "policy" else 0  # of the first step π_old is the policy itself
            for index in range(first, len(steps)):
                self.policy.record_old(index)
        staleness = self.staleness
        self._keep_behavior(self.epochs * len(steps))
        inner: dict[str, list] = defaultdict(list)
        sampling: dict[str, float] = {}  # how engine, π_old and the policy differ, before the first update
        advantages = None
        kl_sum = num_tokens = 0.0
        equal_groups = 0
        for update in range(self.epochs * len(steps)):
            index = update % len(steps)
            step = self._step(steps[index], index, update, rollout)
            terms = self.objective.terms(step)
            if update == 0:
                advantages = terms.columns.get("advantage")
            self.regularizer.add(terms, step)
            terms.correction = self.correction
            report = self.policy.apply(index, terms)
            means = report.token_means
            kl_sum, num_tokens = kl_sum + report.token_sums.get("kl", 0.0), num_tokens + report.num_tokens
            gap, fresh, drift = means.pop("mismatch"), means.pop("fresh"), means.pop("staleness_kl", None)
            if update == 0 and fresh > 0 and self.behavior != "engine":
                sampling["rollout_mismatch"] = gap / fresh
            if update == 0 and drift is not None:
                sampling |= {"staleness": staleness, "staleness_kl": drift}
            equal = step.rewards.max(-1).values == step.rewards.min(-1).values
            equal_groups += int(equal.sum()) if update < len(steps) else 0
            metrics = {"loss": report.loss} | terms.metrics  # a group objective knows its own loss
            metrics |= self.objective.after_update(step, report) | means
            if terms.gate is not None:
                metrics["is_filtered_fraction"] = terms.gate.filtered_fraction(report.filtered_sums, step.lengths)
            metrics |= {
                "grad_norm": report.grad_norm,
                "lr": report.lr,
                "zero_variance_fraction": equal.double().mean().item(),
            }
            for key, value in metrics.items():
                inner[key].append(value)
        if self.regularizer.controller is not None:
            self.regularizer.controller.update(kl_sum / num_tokens, sum(map(len, groups)))
        result = {key: values[-1] for key, values in inner.items()}
        result["zero_variance_fraction"] = equal_groups / len(groups)  # of the rollout
        result |= {f"inner/{key}": values for key, values in inner.items()}
        result |= sampling
        if advantages is not None:
            result["first_advantages"] = advantages[: len(groups[0])].tolist()
        return result

    def _keep_behavior(self, num_updates: int) -> None:
        """Before `num_updates` optimizer steps: the policy's weights are those that sample the next rollout."""
        if self.behavior == "anchor":
            self.policy.update_anchor(0.0)
        self.staleness = num_updates

    def state_dict(self) -> dict:
        return {"staleness": self.staleness}

    def load_state_dict(self, state: dict) -> None:
        self.staleness = state["staleness"]

    def _step(self, groups: list[list[Sample]], index: int, update: int, rollout: int) -> Step:
        rewards = [[self.length_penalty(sample) for sample in group] for group in groups]
        lengths = [[sample.length for sample in group] for group in groups]
        return Step(
            index=index,
            update=update,
            rollout=rollout,
            groups=groups,
            rewards=torch.tensor(rewards, dtype=torch.float64),
            lengths=torch.tensor(lengths, dtype=torch.float64),
        )
