"""A KL coefficient that follows a target."""

LARGEST_ERROR = 0.2  # of KL / target - 1, to either side


class AdaptiveKl:
    """After each rollout of n samples  β ← β (1 + clip(KL / target − 1, −0.2, 0.2) n / horizon).

    KL: nats per token, the mean over all of the rollout's optimizer steps. Reference: arXiv 1909.08593, as OpenRLHF
    0.11.2 has it (trainer/ppo_utils/kl_controller.py), with its names, so that it serves OpenRLHF's step, too.
    """

    def __init__(self, coefficient: float, target: float, horizon: int):
        self.value, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, num_samples: int) -> None:
        error = min(max(kl / self.target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
        self.value *= 1.0 + error * num_samples / self.horizon

    def state_dict(self) -> dict:
        return {"coefficient": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["coefficient"]
