"""A second set of weights beside the policy, for the anchors that outlive a rollout (lagged, ema, reference)."""

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from openrlhf.models import Actor
from torch import Tensor


class AnchorWeights:
    """`model` runs in the policy's dtype and sharding; the moving average is kept in float32 on the CPU, because a
    bf16 average loses every update smaller than 1/256 of the weight.

    Under ZeRO-3 each rank averages its own shard, so nothing is gathered: both models are cut at the same places.
    """

    def __init__(self, model: Actor, zero_stage: int):
        self.model, self.sharded = model, zero_stage == 3
        self.average = {name: self._local(p).detach().float().cpu().clone() for name, p in _parameters(model)}

    @torch.no_grad()
    def update(self, policy: Actor, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy."""
        for name, source in _parameters(policy):
            self.average[name].lerp_(self._local(source).float().cpu(), 1.0 - beta)
        self._write()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole average, on every rank."""
        if not self.sharded:
            return self.average
        whole = {}
        for name, parameter in _parameters(self.model):
            shard = self.average[name].to(parameter.ds_tensor.device)  # NCCL gathers on its device
            shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
            dist.all_gather(shards, shard)
            whole[name] = torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape).cpu()
        return whole

    @torch.no_grad()
    def load_state_dict(self, whole: dict[str, Tensor]) -> None:
        for name, shard in self.average.items():
            if self.sharded:
                start = dist.get_rank() * shard.numel()
                mine = whole[name].flatten()[start : start + shard.numel()]
                shard[: mine.numel()] = mine  # the last rank's shard may be padded
            else:
                shard.copy_(whole[name])
        self._write()

    def _local(self, parameter: Tensor) -> Tensor:
        return parameter.ds_tensor if self.sharded else parameter.data

    def _write(self) -> None:
        for name, parameter in _parameters(self.model):
            if self.sharded and parameter.ds_status == ZeroParamStatus.AVAILABLE:
                parameter.partition()  # small parameters stay gathered between forwards: drop that stale copy
            self._local(parameter).copy_(self.average[name])


def _parameters(actor: Actor):
    return actor.model.module.named_parameters()
