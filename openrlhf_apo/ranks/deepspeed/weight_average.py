"""A moving average of the policy's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from openrlhf.models import Actor
from torch import Tensor
from torch.nn import Parameter


class WeightAverage:
    """Kept in float32 on the CPU, because a bf16 average loses every update smaller than 1/256 of the weight. It
    starts as the weights of `actor`, or as the trained ones among them.

    Under ZeRO-3 each rank averages its own shard, so nothing is gathered: all models are cut at the same places.
    """

    def __init__(self, actor: Actor, zero_stage: int, trained_only: bool = False):
        self.actor, self.sharded, self.trained_only = actor, zero_stage == 3, trained_only
        self.average = {name: self._local(p).detach().float().cpu().clone() for name, p in self._parameters(actor)}

    @torch.no_grad()
    def update(self, policy: Actor, beta: float) -> None:
        """average ← beta · average + (1 − beta) · policy."""
        for name, source in self._parameters(policy):
            self.average[name].lerp_(self._local(source).float().cpu(), 1.0 - beta)

    @torch.no_grad()
    def write_to(self, actor: Actor) -> None:
        """Overwrite the actor's weights with the average, in their dtype."""
        self._write(actor, self.average)

    @contextmanager
    def in_place_of(self, policy: Actor) -> Iterator[None]:
        """The policy has the average for weights, and its own again afterwards, to the bit."""
        own = {name: self._local(p).detach().cpu().clone() for name, p in self._parameters(policy)}
        self.write_to(policy)
        try:
            yield
        finally:
            self._write(policy, own)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The whole average, on every rank."""
        if not self.sharded:
            return self.average
        whole = {}
        for name, parameter in self._parameters(self.actor):
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

    def _local(self, parameter: Parameter) -> Tensor:
        return parameter.ds_tensor if self.sharded else parameter.data

    @torch.no_grad()
    def _write(self, actor: Actor, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters(actor):
            writable(parameter, self.sharded).copy_(values[name])

    def _parameters(self, actor: Actor) -> list[tuple[str, Parameter]]:
        named = actor.model.module.named_parameters()
        return [(name, p) for name, p in named if p.requires_grad or not self.trained_only]


def writable(parameter: Parameter, sharded: bool) -> Tensor:
    """Where this rank has the numbers of a parameter, to be written in place."""
    if not sharded:
        return parameter.data
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        parameter.partition()  # small parameters stay gathered between forwards: drop that stale copy
    return parameter.ds_tensor
