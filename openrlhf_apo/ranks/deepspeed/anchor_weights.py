"""A second set of weights beside the policy, for the anchors that outlive a rollout (lagged, ema, reference)."""

from openrlhf.models import Actor
from torch import Tensor

from openrlhf_apo.ranks.deepspeed.weight_average import WeightAverage


class AnchorWeights:
    """`model` runs in the policy's dtype and sharding, with an average of the policy's weights."""

    def __init__(self, model: Actor, zero_stage: int):
        self.model, self.weights = model, WeightAverage(model, zero_stage)

    def update(self, policy: Actor, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy."""
        self.weights.update(policy, beta)
        self.weights.write_to(self.model)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole average, on every rank."""
        return self.weights.state_dict()

    def load_state_dict(self, whole: dict[str, Tensor]) -> None:
        self.weights.load_state_dict(whole)
        self.weights.write_to(self.model)


class AdapterAnchor(WeightAverage):
    """The anchor of a policy with LoRA: the average of its adapter alone. A forward as the anchor borrows the policy
    for it (`ranks/lora.py`, Adapter.acting_as). It begins as the base model, whatever the policy is by then."""

    def __init__(self, policy: Actor, zero_stage: int):
        super().__init__(policy, zero_stage, trained_only=True)
        self.model = policy
        for name, value in self.average.items():
            if ".lora_B." in name:
                value.zero_()
