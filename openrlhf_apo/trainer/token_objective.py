"""Token and sequence objectives in the trainer: advantages and normalisers from whole groups; the rest per token, by
the ranks (objectives/token_base.py).

pi_old is the policy that made the rollout. In a rollout's first optimizer step theta is pi_old, and no forward is
spent on it; the log-probs of the other steps are recorded before the first update. With asynchronous training theta
has left pi_old by then, and all steps are recorded.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_apo.objectives import Terms, TokenLoss, TokenStep
from openrlhf_apo.trainer.handles import Behavior, PolicyHandle
from openrlhf_apo.trainer.step import Report, Step, per_group


@dataclass(frozen=True)
class TokenPlan:
    """A token objective by value: a loss built with its settings, what it declares to use, and L_max [tokens]."""

    loss: TokenLoss
    uses: frozenset[str] = frozenset()
    max_length: int | None = None


class TokenObjective:
    def __init__(self, policy: PolicyHandle, plan: TokenPlan, behavior: Behavior = "policy"):
        self.policy, self.plan, self.loss, self.on_policy = policy, plan, plan.loss, behavior == "policy"
        self.entropies: dict[int, list[float]] = {}

    def begin_rollout(self, rollout: int, num_steps: int) -> None:
        entropy = "entropy" in self.plan.uses
        for index in reversed(range(1 if self.on_policy and not entropy else 0, num_steps)):
            next_to_train = self.on_policy and index == 0
            entropies = self.policy.record_old(index, entropy=entropy, keep_graph=next_to_train)
            if entropies is not None:
                self.entropies[index] = entropies

    def terms(self, step: Step) -> Terms:
        entropies = None
        if "entropy" in self.plan.uses:
            entropies = per_group(self.entropies[step.index], like=step.rewards)
        return self.loss.terms(
            TokenStep(
                rewards=step.rewards,
                lengths=step.lengths,
                response_ids=[sample.own_ids for sample in step.samples],
                log_ratios=lambda: self._log_ratios(step.index),
                max_length=self.plan.max_length if "max_length" in self.plan.uses else None,
                entropies=entropies,
            )
        )

    def after_update(self, step: Step, report: Report) -> dict:
        log_ratio = per_group(report.log_ratio_sums, like=step.rewards)  # [G, P]
        return {"log_ratio_std": log_ratio.std(-1, correction=0).mean().item()}

    def state_dict(self) -> dict:
        return self.loss.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.loss.load_state_dict(state)

    def _log_ratios(self, step: int) -> list[Tensor]:
        return [torch.tensor(row, dtype=torch.float64) for row in self.policy.log_ratios(step)]
