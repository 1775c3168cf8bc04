"""Token and sequence objectives in the trainer: advantages and normalisers from whole groups; the rest per token, by
the ranks (objectives/token_loss.py).

pi_old is the policy that made the rollout. In a rollout's first optimizer step theta is pi_old, and no forward is
spent on it; the log-probs of the other steps are recorded before the first update.
"""

from torch import Tensor

from openrlhf_apo.objectives import TokenLoss, TokenStep
from openrlhf_apo.trainer.handles import PolicyHandle
from openrlhf_apo.trainer.step import Step, StepReport, StepTerms


class TokenObjective:
    def __init__(self, policy: PolicyHandle, loss: TokenLoss, max_length: int):
        self.policy, self.loss, self.max_length = policy, loss, max_length
        self.entropies: dict[int, Tensor] = {}

    def begin_rollout(self, rollout: int, num_steps: int) -> None:
        first = 0 if self.loss.needs_entropy else 1
        for index in range(first, num_steps):
            entropies = self.policy.record_old(index, entropy=self.loss.needs_entropy)
            if entropies is not None:
                self.entropies[index] = entropies

    def terms(self, step: Step) -> tuple[StepTerms, dict]:
        entropies = self.entropies[step.index].view_as(step.rewards) if self.loss.needs_entropy else None
        terms = self.loss.terms(
            TokenStep(
                rewards=step.rewards,
                lengths=step.lengths,
                max_length=self.max_length,
                response_ids=[sample.response_ids for sample in step.samples],
                entropies=entropies,
                log_ratios=lambda: self.policy.log_ratios(step.index),
            )
        )
        columns = {"advantage": terms.advantages.flatten(), "weight": terms.weights.flatten()}
        return StepTerms(columns, terms.loss, terms.token_weights), terms.metrics

    def after_update(self, step: Step, report: StepReport) -> dict:
        log_ratio = report.log_ratio_sums.view_as(step.rewards)  # [G, P]
        return {"log_ratio_std": log_ratio.std(-1, correction=0).mean().item()}

    def state_dict(self) -> dict:
        return self.loss.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.loss.load_state_dict(state)
