"""What a learner needs of the models on its rank."""

from typing import Literal, Protocol

from torch import Tensor

from openrlhf_apo.ranks.micro_batch import MicroBatch

Weights = Literal["policy", "anchor", "reference"]


class Backend(Protocol):
    """The policy with its optimizer, and the frozen models beside it, sharded however the backend likes."""

    dp_size: int  # ranks over which `backward` averages gradients
    vocabulary: int  # tokens that the policy has an embedding of

    def forward(
        self, weights: Weights, batch: MicroBatch, *, train: bool = False, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(log-probs, entropies or None), both [B, T-1], nats, under the rollout's temperature; log-probs are 0
        outside the response. train: for a backward pass, with the policy's weights."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar to those of the step."""

    def step(self) -> tuple[float, float]:
        """Clip, step the optimizer and the scheduler, forget the gradients. -> (norm before clipping, learning
        rate)."""

    def update_anchor(self, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy, in float32."""
