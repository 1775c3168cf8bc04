"""A second set of weights beside the policy, for the anchors that outlive a rollout (lagged, ema, reference)."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from openrlhf.models import Actor
from torch import Tensor
from torch.nn import Parameter


class AnchorWeights:
    """`model` runs in the policy's dtype and sharding; the moving average is kept in float32 on the CPU, because a
    bf16 average loses every update smaller than 1/256 of the weight.

    Under ZeRO-3 each rank averages its own shard, so nothing is gathered: both models are cut at the same places.
    """

    def __init__(self, model: Actor, zero_stage: int):
        self.model, self.sharded = model, zero_stage == 3
        self.average = {name: self._local(p).detach().float().cpu().clone() for name, p in self._parameters(model)}

    @torch.no_grad()
    def update(self, policy: Actor, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy."""
        for name, source in self._parameters(policy):
            self.average[name].lerp_(self._local(source).float().cpu(), 1.0 - beta)
        self._write()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole average, on every rank."""
        if not self.sharded:
            return self.average
        whole = {}
        for name, parameter in self._parameters(self.model):
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

    def _parameters(self, actor: Actor) -> Iterator[tuple[str, Parameter]]:
        yield from actor.model.module.named_parameters()

    def _local(self, parameter: Parameter) -> Tensor:
        return parameter.ds_tensor if self.sharded else parameter.data

    def _write(self) -> None:
        for name, parameter in self._parameters(self.model):
            writable(parameter, self.sharded).copy_(self.average[name])


class AdapterAnchor(AnchorWeights):
    """The anchor of a policy with LoRA: the average of its adapter alone. A forward as the anchor borrows the policy
    for it (`ranks/lora.py`, Adapter.acting_as). It begins as the base model, whatever the policy is by then."""

    def __init__(self, policy: Actor, zero_stage: int):
        super().__init__(policy, zero_stage)
        for name, value in self.average.items():
            if ".lora_B." in name:
                value.zero_()

    def _parameters(self, actor: Actor) -> Iterator[tuple[str, Parameter]]:
        yield from ((name, p) for name, p in super()._parameters(actor) if p.requires_grad)

    def _write(self) -> None:
        """The policy keeps its own."""


def writable(parameter: Parameter, sharded: bool) -> Tensor:
    """Where this rank has the numbers of a parameter, to be written in place."""
    if not sharded:
        return parameter.data
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.partition()  # small parameters stay gathered between forwards: drop that stale copy
    return parameter.ds_tensor
