"""The ESS-targeted schedule: the alpha at which the weights have an effective sample size of gamma P.

    ESS(alpha) = 1 / sum_i w_i^2, w normalised over the group     (21)
    weights="ratio":      w = (q/p)^alpha             Section 5.2; ESS falls as alpha grows, so bisection is safe
    weights="geometric":  w = q^alpha p^(1-alpha)     Section 7.1; ESS may rise and fall, so scan for a bracket first

If there are several roots, the one nearest alpha_max counts. If ESS(alpha_max) >= gamma P, the result is alpha_max
("clamped_hi"). If the ESS is below gamma P everywhere, the result is alpha_min ("clamped_lo"). With binary rewards
near the anchor "clamped_hi" is common: k correct answers have ESS >= k at any alpha, so k >= gamma P leaves no root.

A zero-variance group has uniform q. Its ESS is about P at any alpha, which says nothing, so such groups are left out.
The result is smoothed: alpha_t = (1 - rho) alpha_(t-1) + rho alpha*, from alpha_0 = alpha_max     (23)

Reference: APO, arXiv 2512.22953; defaults are its values. It defines both weights, and names no solver.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from openrlhf_apo.objectives import ess
from openrlhf_apo.objectives.checks import check_groups
from openrlhf_apo.settings import setting

from .controller import BoundedAlpha, alpha_controller
from .signals import AlphaSignals

OUTCOMES = ("root", "clamped_hi", "clamped_lo", "skipped")
SCAN_POINTS = 201
BISECTIONS = 60  # to the last bit of a float64


@alpha_controller("ess")
@dataclass(eq=False)
class EssAlpha(BoundedAlpha):
    """scope="batch": one alpha, for the mean ESS over groups (the paper). scope="group": one alpha per group. The next
    step has other prompts, so each group is smoothed from the mean alpha of the last step; rho=1.0 does not smooth.
    """

    gamma: float = setting(0.5, "target of ESS / P (Eq. 21)", within="(0, 1)", flag="apo.gamma")
    weights: Literal["ratio", "geometric"] = setting(
        "ratio", "(q/p)^alpha, or q^alpha p^(1-alpha)", flag="apo.ess_weights"
    )
    scope: Literal["batch", "group"] = setting("batch", "one alpha, or one per group", flag="apo.ess_scope")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state = {"alpha": self.alpha_max}

    def step(self, signals: AlphaSignals) -> float | torch.Tensor:
        """Needs log_q and log_p. Returns a float, or with scope="group" a tensor[G].

        A zero-variance group keeps the previous alpha ("skipped"); so does a batch that has only such groups.
        `metrics["ess"]` is ESS / P at the returned alpha, a mean over the other groups; it is absent if there is none.
        """
        if signals.log_q is None or signals.log_p is None:
            raise ValueError("log_q and log_p must be given: the ess controller reads them")
        log_q, log_p = check_groups("log_q", signals.log_q.detach()), check_groups("log_p", signals.log_p.detach())
        if self.gamma * log_p.shape[1] <= 1:
            raise ValueError(f"gamma must exceed 1/P, as ESS is never below 1: got {self.gamma}, P = {log_p.shape[1]}")

        per_group = self.scope == "group"
        informative = log_q.amax(dim=-1) > log_q.amin(dim=-1)
        # [N, M, P]: N problems, each for the mean ESS of its M groups. `solvable` says which alphas have a problem.
        log_q, log_p = (x[informative].unsqueeze(1 if per_group else 0) for x in (log_q, log_p))
        solvable = informative if per_group else informative.any(dim=0, keepdim=True)
        alpha = log_p.new_full(solvable.shape, self._state["alpha"])
        outcomes = ["skipped"] * int((~solvable).sum())
        measured = {}
        if solvable.any():
            root, found = self._solve(log_q, log_p)
            outcomes += found
            smoothed = alpha[solvable] + self.rho * (root - alpha[solvable])
            alpha[solvable] = smoothed.clamp(self.alpha_min, self.alpha_max)
            measured["ess"] = self._ess_fraction(alpha[solvable], log_q, log_p).mean().item()
            self._state = {"alpha": alpha.mean().item()}

        outcome = {name: outcomes.count(name) for name in OUTCOMES} if per_group else outcomes[0]
        self.metrics = {**self._state, **measured, "ess_outcome": outcome}
        return alpha if per_group else alpha.item()

    def _ess_fraction(self, alpha: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """Mean over M of ESS / P: alpha[..., N], log_q[N, M, P], log_p[N, M, P] -> [..., N]."""
        log_weights = alpha[..., None, None] * (log_q - log_p)
        if self.weights == "geometric":
            log_weights = log_weights + log_p
        return ess(log_weights).mean(dim=-1) / log_p.shape[-1]

    def _solve(self, log_q: torch.Tensor, log_p: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """For each of N problems (log_q, log_p: [N, M, P]) the alpha* [N] nearest alpha_max, and how it was found."""
        points = 2 if self.weights == "ratio" else SCAN_POINTS
        grid = torch.linspace(self.alpha_min, self.alpha_max, points, dtype=log_p.dtype, device=log_p.device)
        reaches = self._ess_fraction(grid[:, None], log_q, log_p) >= self.gamma  # [points, N]
        # The last grid point that reaches gamma; alpha_max itself, or the lower end of the bracket.
        last = torch.where(reaches, torch.arange(points, device=grid.device)[:, None], -1).amax(dim=0)
        low, high = grid[last.clamp(min=0)], grid[(last + 1).clamp(max=points - 1)]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            reached = self._ess_fraction(middle, log_q, log_p) >= self.gamma
            low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)

        outcomes = ["clamped_lo" if k < 0 else "clamped_hi" if k == points - 1 else "root" for k in last.tolist()]
        return torch.where(last < 0, self.alpha_min, low), outcomes
