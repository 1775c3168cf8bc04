"""GTPO: good and bad answers do not fight over a token that they share, and high entropy costs advantage.

    L = -1/N sum_i delta_i (A_i - gamma H_i) 1/|y_i| sum_t r_it lambda_it
    lambda_it = 1, and on conflict tokens 0 where A_i < 0, 2 where A_i > 0
    delta_i = 0 if H_ini < ln 2 < H_i, else 1

Conflict tokens: some answer with the other sign of A has the same token at the same place. They are counted from the
start up to the first token without a conflict, and in the same way from the end. H_i: mean token entropy of the answer
under pi_old, nats. H_ini: mean of H_i in the first optimizer step of the run. No clip, no KL, no reference.

Reference: arXiv 2508.03772, its formula. Its public code differs: it also divides by the number of conflict tokens,
takes 0.7 for ln 2 whatever H_ini is, and its ratio is always 1 (one update per rollout). gamma = 0.1 and the weight 2
are the code's.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_apo.settings import setting

from .clip import ratio
from .registry import token_loss
from .terms import Terms
from .token_base import TokenLoss, TokenStep

ENTROPY_THRESHOLD = math.log(2)  # nats


@token_loss("gtpo", uses=("entropy",))
@dataclass(eq=False)
class Gtpo(TokenLoss):
    gamma: float = setting(0.1, "weight of an answer's entropy in its advantage", within="[0, inf)")
    conflict_weight: float = setting(2.0, "weight of conflict tokens in good answers", within="[0, inf)")
    initial_entropy: float | None = None  # H_ini, nats: state, not a setting

    aggregation = "sequence"

    def terms(self, step: TokenStep) -> Terms:
        assert step.entropies is not None  # declared
        if self.initial_entropy is None:
            self.initial_entropy = step.entropies.mean().item()
        z = self.advantages(step.rewards)  # [G, P]
        advantages = z - self.gamma * step.entropies
        if self.initial_entropy < ENTROPY_THRESHOLD:
            advantages = torch.where(step.entropies > ENTROPY_THRESHOLD, 0.0, advantages)
        size = z.shape[-1]
        token_weights: list[list[float]] = []
        conflicts = 0
        for group, signs in enumerate(z.sign().tolist()):
            answers = step.response_ids[group * size : (group + 1) * size]
            for answer, sign in zip(answers, signs, strict=True):
                rivals = [other for other, s in zip(answers, signs, strict=True) if s * sign < 0]
                conflict = conflict_tokens(answer, rivals)
                weight = self.conflict_weight if sign > 0 else 0.0
                token_weights.append([weight if c else 1.0 for c in conflict])
                conflicts += sum(conflict)
        metrics = {"conflict_fraction": conflicts / step.lengths.sum().item()}
        return self.token_terms(step, advantages, token_weights=token_weights, metrics=metrics)

    def per_token(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        return -ratio(log_probs, old_log_probs) * advantages, torch.zeros_like(mask, dtype=torch.bool)

    def state_dict(self) -> dict:
        return {"initial_entropy": self.initial_entropy}

    def load_state_dict(self, state: dict) -> None:
        self.initial_entropy = state["initial_entropy"]


def conflict_tokens(answer: list[int], rivals: list[list[int]]) -> list[bool]:
    """Whether each token of `answer` is in conflict: in the run of tokens, from the start or from the end, that some
    rival has at the same place."""
    leading = _run(answer, rivals)
    trailing = _run(answer[::-1], [rival[::-1] for rival in rivals])
    return [t < leading or t >= len(answer) - trailing for t in range(len(answer))]


def _run(answer: list[int], rivals: list[list[int]]) -> int:
    for t, token in enumerate(answer):
        if not any(t < len(rival) and rival[t] == token for rival in rivals):
            return t
    return len(answer)
