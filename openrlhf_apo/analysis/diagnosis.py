"""What α does to the gradient of a group: the maths of `report --diag`. Torch only.

Everything is a finite sum over a group of P answers, so it is exact; nothing is sampled. In log-probabilities l (p =
softmax(u), u = log_ratio / tau_anc, r = q/p, as in openrlhf_apo.objectives) the gradient is

    grad D_alpha = -(1/alpha) E_{i~p}[r_i^alpha grad log p(i)],  grad log p(i) = (e_i - p) / tau_anc     (11)

Reference: APO, arXiv 2512.22953: Eq. 11, Proposition 4.3 (variance), section 4.4 (curvature).
"""

from dataclasses import dataclass

import torch

from openrlhf_apo.objectives import AlphaDivergenceLoss, GroupTargetBuilder, anchored_log_policy

ALPHAS = tuple(i / 40 for i in range(2, 39))  # 0.05 to 0.95
PAPER_ALPHAS = (0.35, 0.6, 0.9)  # the paper's alpha_min, fixed alpha and alpha_max
SPREAD = 0.5  # [nats] standard deviation of the synthetic log-ratios
MAX_BINS = 10


@dataclass(frozen=True)
class Diagnosis:
    """Quartiles (25, 50, 75 %) over the groups whose rewards differ.

    curves: {(quantity, spread): [A, 3]} over ALPHAS; spread 0.0 is the anchor, SPREAD synthetic log-ratios. Quantities
    are variance, noise_to_signal (both of Eq. 11), centred_variance, centred_noise_to_signal, curvature.
    magnitudes: {alpha: [B, 3]} over the bins of difficulty, whose mean reward is `difficulty[B]`.
    """

    n_groups: int
    n_varied: int
    group_size: int
    beta_r: float
    tau_anc: float
    curves: dict[tuple[str, float], torch.Tensor]
    difficulty: torch.Tensor
    bin_sizes: torch.Tensor
    magnitudes: dict[float, torch.Tensor]

    def __str__(self) -> str:
        share = self.n_varied / self.n_groups
        return (
            f"{self.n_varied} of {self.n_groups} groups ({share:.0%}) have rewards that differ; the others are left "
            f"out. {self.group_size} answers each, β_r {self.beta_r:g}, τ_anc {self.tau_anc:g}."
        )


def diagnose(rewards: torch.Tensor, beta_r: float, tau_anc: float) -> Diagnosis:
    """Diagnose groups with rewards[G, P]. ValueError for a bad setting, or when no group has rewards that differ."""
    log_q = GroupTargetBuilder(beta_r)(rewards)
    varied = (rewards != rewards[:, :1]).any(dim=-1)
    if not varied.any():
        raise ValueError(f"none of the {len(rewards)} groups has rewards that differ, so none has a gradient")
    log_q = log_q[varied]
    noise = torch.randn(log_q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curves = {}
    for spread in (0.0, SPREAD):
        log_ratio = spread * noise
        by_alpha = [_quantities(log_ratio, log_q, alpha, tau_anc) for alpha in ALPHAS]
        for name in by_alpha[0]:
            curves[name, spread] = torch.stack([quartiles(values[name]) for values in by_alpha])
    bins, difficulty = difficulty_bins(rewards.double())
    bins, difficulty = bins[varied], difficulty[varied]
    members = [bins == index for index in bins.unique()]
    ratios = {alpha: relative_magnitude(log_q, alpha, tau_anc) for alpha in PAPER_ALPHAS}
    return Diagnosis(
        n_groups=len(rewards),
        n_varied=len(log_q),
        group_size=rewards.shape[1],
        beta_r=beta_r,
        tau_anc=tau_anc,
        curves=curves,
        difficulty=torch.stack([difficulty[member].mean() for member in members]),
        bin_sizes=torch.stack([member.sum() for member in members]),
        magnitudes={alpha: torch.stack([quartiles(r[member]) for member in members]) for alpha, r in ratios.items()},
    )


def _quantities(log_ratio: torch.Tensor, log_q: torch.Tensor, alpha: float, tau_anc: float) -> dict[str, torch.Tensor]:
    variance, signal = estimator_noise(log_ratio, log_q, alpha, tau_anc, centred=False)
    centred, _ = estimator_noise(log_ratio, log_q, alpha, tau_anc, centred=True)
    return {
        "variance": variance,
        "noise_to_signal": variance / signal,
        "centred_variance": centred,
        "centred_noise_to_signal": centred / signal,
        "curvature": effective_curvature(log_ratio, log_q, alpha, tau_anc),
    }


def estimator_noise(
    log_ratio: torch.Tensor, log_q: torch.Tensor, alpha: float, tau_anc: float, *, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance and squared mean of the gradient estimated from one answer i ~ p: log_ratio[G, P] -> [G], [G].

    The estimator is g_i = -(1/alpha) r_i^alpha grad log p(i), Equation 11 without its expectation; the variance is
    the trace of its covariance. `centred` subtracts E_p[r^alpha] from r_i^alpha. The mean stays, because
    E_p[grad log p] = 0, and the coefficients of a whole group hold r^alpha in this form. At the anchor the centred
    variance is P - 2 times the squared mean, whatever alpha.
    """
    log_p = anchored_log_policy(log_ratio, tau_anc)
    p, weight = log_p.exp(), (alpha * (log_q - log_p)).exp()
    mean_weight = (p * weight).sum(dim=-1, keepdim=True)
    mean = p * (weight - mean_weight) / (alpha * tau_anc)
    score_norm = (1 - 2 * p + p.square().sum(dim=-1, keepdim=True)) / tau_anc**2  # |grad log p(i)|^2
    scale = (weight - mean_weight if centred else weight) / alpha
    signal = mean.square().sum(dim=-1)
    return (p * scale.square() * score_norm).sum(dim=-1) - signal, signal


def effective_curvature(log_ratio: torch.Tensor, log_q: torch.Tensor, alpha: float, tau_anc: float) -> torch.Tensor:
    """C_alpha = tr H / tr F of each group, shape [G]: 1 at p = q for every alpha, and everywhere at alpha = 1.

    H is the Hessian of D_alpha(q || softmax(u)) in u, F = diag(p) - p p^T the Fisher matrix; in log-probabilities both
    are 1/tau_anc^2 times as large. With w = p r^alpha, W = sum w:

        H = (W F - (1-alpha) (diag(w) - w p^T - p w^T + W p p^T)) / alpha

    At the anchor C_alpha = W = 1 - alpha (1-alpha) D_alpha.
    """
    log_p = anchored_log_policy(log_ratio, tau_anc)
    p, w = log_p.exp(), (log_p + alpha * (log_q - log_p)).exp()
    total, p_square = w.sum(dim=-1), p.square().sum(dim=-1)
    bend = total - 2 * (w * p).sum(dim=-1) + total * p_square
    fisher = 1 - p_square
    return (total * fisher - (1 - alpha) * bend) / (alpha * fisher)


def relative_magnitude(log_q: torch.Tensor, alpha: float, tau_anc: float) -> torch.Tensor:
    """sum_i |c_i| at the anchor over that of z-score REINFORCE, |A_i| / (P tau_anc beta_r): log_q[G, P] -> [G]."""
    c = AlphaDivergenceLoss(tau_anc).coefficients(torch.zeros_like(log_q), log_q, alpha)
    advantage = log_q - log_q.mean(dim=-1, keepdim=True)  # A / beta_r
    return c.abs().sum(dim=-1) / advantage.abs().sum(dim=-1) * log_q.shape[-1] * tau_anc


def difficulty_bins(rewards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards[G, P] -> each group's bin of equal width, and its mean reward: [G], [G].

    The bins span the rewards; with binary ones and P up to MAX_BINS there is one for each number of right answers.
    """
    n_bins = min(rewards.shape[1], MAX_BINS)
    mean, low, high = rewards.mean(dim=-1), rewards.min(), rewards.max()
    return ((mean - low) / (high - low) * n_bins).round().long(), mean


def quartiles(values: torch.Tensor) -> torch.Tensor:
    """values[N] -> the 25, 50 and 75 % quantiles [3]."""
    return torch.quantile(values, values.new_tensor([0.25, 0.5, 0.75]))
