"""A second set of weights beside the policy, for the anchors that outlive a rollout (lagged, ema, reference)."""

from openrlhf.models import Actor
from torch import Tensor

from openrlhf_apo.ranks.deepspeed.weight_average import WeightAverage


class AnchorWeights:
    """`model` runs in the policy's dtype and sharding, with an average of the policy's weights."""

    def __init__(self, model: Actor, zero_stage: int):
        self.model, self.average = model, WeightAverage(model, zero_stage)

    def update(self, policy: Actor, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy."""
        self.average.update(policy, beta)
        self.average.write_to(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole average, on every rank."""
        return self.average.state_dict()

    def load_state_dict(self, whole: dict[str, Tensor]) -> None:
        self.average.load_state_dict(whole)
        self.average.write_to(self.model)
