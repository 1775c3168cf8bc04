"""The sum that one micro-batch adds to an optimizer step (objectives/terms.py)."""

import torch
from torch import Tensor

from openrlhf_apo.objectives import Terms
from openrlhf_apo.objectives.kl import approximate_kl, unbiased_kl


def micro_batch_loss(
    terms: Terms,
    log_probs: Tensor,
    mask: Tensor,
    old: Tensor,
    rollout: Tensor,
    reference: Tensor | None,
    entropies: Tensor | None,
    kl_estimator: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What B samples add to the sum of `terms`, and what was measured per token.

    log_probs, mask, log-probs under the old policy, the engine's and the reference policy, entropies: [B, T], nats,
    log-probs 0 where mask is 0. The reference is needed for the columns `kl` and `kl_reward`, entropies for `entropy`.
    """
    loss, measured = log_probs.new_zeros(()), {}
    correction = terms.gate
    if correction is not None:
        outside = correction.outside(old, rollout, mask)  # [B, T]
        measured["is_filtered"] = outside.to(mask)
    if "log_prob" in terms.columns:
        coefficients = terms.column("log_prob", log_probs)  # [B, 1]
        if correction is not None:
            coefficients = coefficients * ~outside[:, :1]  # one gate for an answer
        loss = loss + (coefficients * log_probs).sum()
    if terms.loss is not None:
        advantages = terms.column("advantage", log_probs)  # [B, 1]
        if "kl_reward" in terms.columns:
            kl = approximate_kl(old, reference, kl_estimator)
            to_come = (kl * mask).flip(-1).cumsum(-1).flip(-1)
            advantages = advantages - terms.column("kl_reward", log_probs) * to_come  # [B, T]
            measured["kl"] = kl
        weights = terms.column("weight", log_probs) * mask
        if correction is not None:
            measured["is_weight_mean"] = correction.weights(old, rollout, outside)
            weights = weights * measured["is_weight_mean"]
        compared = old if correction is terms.correction else rollout
        per_token, clipped = terms.loss.per_token(log_probs, compared, advantages, mask)
        if terms.token_weights is not None:
            weights = weights * _on_response_tokens(terms.token_weights, mask)
        loss = loss + (weights * per_token).sum()
        measured |= {"clipped_fraction": clipped.to(mask), "ppo_kl": old - log_probs.detach()}
    if "kl" in terms.columns:
        if terms.unbiased_kl:
            kl = unbiased_kl(log_probs, old, reference, kl_estimator)
        else:
            kl = approximate_kl(log_probs, reference, kl_estimator)
        loss = loss + (terms.column("kl", log_probs) * mask * kl).sum()
        measured["kl"] = kl.detach()
    if "entropy" in terms.columns:
        loss = loss - (terms.column("entropy", log_probs) * mask * entropies).sum()
        measured["entropy"] = entropies.detach()
    return loss, measured


def _on_response_tokens(values: list[list[float]], mask: Tensor) -> Tensor:
    """values of each sample's response tokens -> [B, T], 0 elsewhere."""
    placed = torch.zeros_like(mask)
    for row, where, numbers in zip(placed, mask > 0, values, strict=True):
        row[where] = torch.tensor(numbers, dtype=torch.float64).to(row)
    return placed
