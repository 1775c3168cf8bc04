"""KL of the policy to a reference, estimated on each sampled token.

    k1 = log pi - log pi_ref        k2 = k1^2 / 2        k3 = e^(-k1) - 1 + k1

All are kept in [-10, 10], as in OpenRLHF and verl. For k3 that leaves no gradient to a token whose log-prob is more
than 2.61 nats below the reference's.

Reference: Schulman, http://joschu.net/blog/kl-approx.html; the cap is OpenRLHF 0.11.2's, models/utils.py.
"""

from torch import Tensor

LIMIT = 10.0
LARGEST_WEIGHT = 10.0  # of an importance weight


def approximate_kl(log_probs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """log_probs, reference: any one shape, nats -> the estimate of each token. estimator: k1, k2 or k3."""
    log_ratio = log_probs - reference
    if estimator == "k2":
        log_ratio = log_ratio.square() / 2
    elif estimator == "k3":
        log_ratio = log_ratio.clamp(min=-LIMIT)  # where k3 is beyond its cap anyway, and e^(-k1) may be infinite
        log_ratio = (-log_ratio).exp() - 1 + log_ratio
    return log_ratio.clamp(-LIMIT, LIMIT)


def unbiased_kl(log_probs: Tensor, old: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """The value of `approximate_kl`, with the gradient of KL(pi || pi_ref) in expectation over tokens that pi_old
    sampled: w k1 grad log pi, w = min(pi / pi_old, 10), the same for every estimator and without its cap."""
    weight = (log_probs - old).exp().clamp(max=LARGEST_WEIGHT).detach()
    surrogate = weight * (log_probs - reference).square() / 2  # whose gradient that is
    return approximate_kl(log_probs, reference, estimator).detach() + surrogate - surrogate.detach()
