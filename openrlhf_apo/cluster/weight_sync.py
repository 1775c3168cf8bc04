"""How a bucket of weights gets from the policy's ranks to the workers of the engines.

A sender lives in the policy's actors: in rank 0's alone, or in every rank's (`every_rank`). `send` returns once all
engines have loaded the bucket. OpenRLHF sends one tensor after the other (ppo_actor.py:409, vllm_worker_wrap.py).
vLLM's own senders of packed weights (vllm/distributed/weight_transfer) need CUDA streams: no test without a GPU could
run them.
"""

import socket

import ray
import torch
import torch.distributed as dist
from openrlhf.trainer.ray.utils import get_physical_gpu_id
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from openrlhf_apo.cluster.buckets import Slot


class ObjectStore:
    """Through Ray's shared memory, from which the engines load without a copy."""

    every_rank, device = False, "cpu"

    def __init__(self, engines: list):
        self.engines = engines

    def send(self, slots: list[Slot], buffer: Tensor) -> None:
        stored = ray.put(buffer)  # once for all engines
        ray.get([engine.workers.remote("load_bucket", slots, stored) for engine in self.engines])


class Broadcast:
    """Over a process group of the policy's rank 0 and all workers: NCCL between GPUs, gloo between CPUs."""

    every_rank = False

    def __init__(self, engines: list, workers_per_engine: int, backend: str):
        self.engines, self.device = engines, "cuda" if backend == "nccl" else "cpu"
        address = ray.util.get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        # The policy's rank 0, then the workers of engine 0, of engine 1, ...
        world_size = 1 + len(engines) * workers_per_engine
        joining = [
            engine.workers.remote("join_sync_group", address, port, 1 + i * workers_per_engine, world_size, backend)
            for i, engine in enumerate(engines)
        ]
        self.group = sync_group(address, port, 0, world_size, backend)
        ray.get(joining)

    def send(self, slots: list[Slot], buffer: Tensor) -> None:
        receiving = [engine.workers.remote("receive_bucket", slots, buffer.numel()) for engine in self.engines]
        try:
            broadcast(buffer, self.group)
        except RuntimeError:  # of a worker that is gone, of which Ray says more
            ray.get(receiving)
            raise
        ray.get(receiving)


class CudaIpc:
    """From each rank to the worker on the same GPU, which maps the rank's buffer: nothing is copied."""

    every_rank, device = True, "cuda"

    def __init__(self, engines: list):
        self.engines = engines

    def send(self, slots: list[Slot], buffer: Tensor) -> None:
        torch.cuda.synchronize()  # the copies into the buffer, before another process reads it
        handles = [None] * dist.get_world_size()
        dist.all_gather_object(handles, (get_physical_gpu_id(), reduce_tensor(buffer)))
        try:
            if dist.get_rank() == 0:
                ray.get([engine.workers.remote("load_shared_bucket", slots, dict(handles)) for engine in self.engines])
        finally:
            dist.barrier()  # a rank's buffer lives until all workers have read theirs
        torch.cuda.ipc_collect()


def sync_group(address: str, port: int, rank: int, world_size: int, backend: str) -> dist.ProcessGroup:
    """A process group beside the default ones that DeepSpeed and vLLM have made in their processes."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    return stateless_init_torch_distributed_process_group(address, port, rank, world_size, backend)


def broadcast(buffer: Tensor, group: dist.ProcessGroup) -> None:
    """From rank 0. Not dist.broadcast, which knows only groups inside the default one."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([buffer], options).wait()
