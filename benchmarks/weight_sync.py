"""Weight sync over a process group: one call per tensor, as OpenRLHF does it, against one per bucket.

    .venv/bin/python benchmarks/weight_sync.py

A model of 300 tensors with random weights, of Qwen3's shapes, goes from this process to a Ray actor in the engine's
place, over gloo. Tensor by tensor is, for each, a remote call, a broadcast and the wait for both (ppo_actor.py:421);
both load a tensor by copying it into the model. The two ways alternate. `--json FILE` writes what the table says.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
from measure import ratio, write_json

from openrlhf_apo import cpu
from openrlhf_apo.cluster.buckets import bounded_runs, bucket_bytes, pack
from openrlhf_apo.cluster.vllm_worker import WeightWorker
from openrlhf_apo.cluster.weight_sync import Broadcast, broadcast

LAYERS = 27  # of 11 tensors; with embedding, final norm and head 300


def shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    half = hidden // 2
    layer = {
        **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj.weight": (half, hidden) for name in "kv"},
        **{f"self_attn.{name}_norm.weight": (64,) for name in "qk"},
        **{f"mlp.{name}_proj.weight": (3 * hidden, hidden) for name in ("gate", "up")},
        "mlp.down_proj.weight": (hidden, 3 * hidden),
        **{f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")},
    }
    layers = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}
    vocabulary = {name: (4096, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    return layers | vocabulary | {"model.norm.weight": (hidden,)}


class Model:
    def __init__(self, hidden: int):
        self.weights = {name: torch.zeros(shape) for name, shape in shapes(hidden).items()}

    def load_weights(self, weights) -> set[str]:
        weights = dict(weights)
        for name, weight in weights.items():
            self.weights[name].copy_(weight)
        return set(weights)


class Engine:
    """RolloutActor's part in a sync, without vLLM's model around it."""

    def __init__(self, hidden: int):
        torch.set_num_threads(1)
        self.worker = WeightWorker()
        self.worker.rank, self.worker.device = 0, torch.device("cpu")
        self.worker.model_runner = SimpleNamespace(model=Model(hidden))

    def workers(self, method: str, *arguments) -> list:
        return [getattr(self.worker, method)(*arguments)]

    def update_weight(self, name: str, dtype: torch.dtype, shape: torch.Size) -> None:
        weight = torch.empty(shape, dtype=dtype)
        broadcast(weight, self.worker.sync_group)
        self.worker.model_runner.model.load_weights([(name, weight)])

    def total(self) -> float:
        return sum(weight.double().sum().item() for weight in self.worker.model_runner.model.weights.values())


def tensor_by_tensor(sender: Broadcast, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        calls = [engine.update_weight.remote(name, weight.dtype, weight.shape) for engine in sender.engines]
        broadcast(weight, sender.group)
        ray.get(calls)


def in_buckets(sender: Broadcast, weights: dict[str, torch.Tensor]) -> None:
    named = list(weights.items())
    for run in bounded_runs([weight.nbytes for weight in weights.values()], bucket_bytes()):
        sender.send(*pack(named[run.start : run.stop], sender.device))


WAYS = {"tensor by tensor": tensor_by_tensor, "in buckets": in_buckets}


def measure(hidden: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each repetition."""
    engine = ray.remote(Engine).remote(hidden)
    sender = Broadcast([engine], 1, "gloo")
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for repetition in range(repetitions + 1):  # the first is to warm up
        for name, sync in WAYS.items():
            weights = {key: torch.randn(shape) for key, shape in shapes(hidden).items()}
            start = time.perf_counter()
            sync(sender, weights)
            took = time.perf_counter() - start
            expected = sum(weight.double().sum().item() for weight in weights.values())
            if ray.get(engine.total.remote()) != expected:
                sys.exit(f"{name}: the engine does not hold what was sent")
            if repetition:
                seconds[name].append(took)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model (default 256: 90 MB)")
    parser.add_argument("--repetitions", type=int, default=7, help="of each way (default 7)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was measured there too")
    args = parser.parse_args()

    cpu.decide("cpu")
    torch.set_num_threads(1)
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level="warning")
    seconds = measure(args.hidden, args.repetitions)
    ray.shutdown()

    sizes = [torch.Size(shape).numel() * 4 for shape in shapes(args.hidden).values()]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    buckets = ratio(medians["in buckets"], medians["tensor by tensor"], "lower")
    print(f"{len(sizes)} tensors, {sum(sizes) / 1e6:.0f} MB, {args.repetitions} repetitions in turn, gloo, ms")
    for name, values in seconds.items():
        print(f"{name:16}  median {1e3 * medians[name]:6.0f}   {1e3 * min(values):6.0f} to {1e3 * max(values):6.0f}")
    print(f"ratio {buckets['value']:.2f}")
    measurements = [{"case": name, "sync_s": value} for name, values in seconds.items() for value in values]
    write_json(args.json, "weight_sync", measurements, {"in buckets: sync_s": buckets}, bytes=sum(sizes))


if __name__ == "__main__":
    main()
