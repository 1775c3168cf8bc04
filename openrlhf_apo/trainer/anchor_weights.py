"""A second set of weights beside the policy, for the anchors that outlive a rollout (lagged, ema, reference)."""

import torch
from deepspeed.runtime.zero import GatheredParameters
from openrlhf.models import Actor


class AnchorWeights:
    """`model` runs in the policy's dtype and sharding; the moving average is kept in float32 on the CPU, because a
    bf16 average loses every update smaller than 1/256 of the weight."""

    def __init__(self, model: Actor, zero_stage: int):
        self.model, self.zero_stage = model, zero_stage
        self.average: dict[str, torch.Tensor] = {}
        self.update(model, beta=0.0)

    @torch.no_grad()
    def update(self, policy: Actor, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy."""
        sources = dict(policy.model.module.named_parameters())
        for name, target in self.model.model.module.named_parameters():
            with GatheredParameters([sources[name], target], modifier_rank=0, enabled=self.zero_stage == 3):
                new = sources[name].detach().float().cpu()
                self.average[name] = new.clone() if beta == 0.0 else self.average[name].lerp_(new, 1.0 - beta)
                target.copy_(self.average[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.average

    @torch.no_grad()
    def load_state_dict(self, average: dict[str, torch.Tensor]) -> None:
        self.average = average
        for name, target in self.model.model.module.named_parameters():
            with GatheredParameters([target], modifier_rank=0, enabled=self.zero_stage == 3):
                target.copy_(average[name])
