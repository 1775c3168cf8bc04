"""The rollout engines: vLLM in Ray actors, one batched call per rollout."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import ray
from openrlhf.trainer.ray.utils import get_bundle_indices, ray_noset_visible_devices
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from openrlhf_apo import cpu
from openrlhf_apo.cluster.calls import get_all
from openrlhf_apo.cluster.weight_check import compare_weight_sums, refuse_unwritten
from openrlhf_apo.cluster.weight_sync import Broadcast, CudaIpc, ObjectStore
from openrlhf_apo.errors import ProcessDied
from openrlhf_apo.trainer.completions import Completion, Prefix, Request, encode, samples_of, seed_of
from openrlhf_apo.trainer.handles import Pending, SamplingSettings
from openrlhf_apo.trainer.samples import Prompt, Sample

if TYPE_CHECKING:  # this module is imported by the engines' processes, which need no DeepSpeed
    from openrlhf_apo.cluster.policy import RayPolicy

T = TypeVar("T")
logger = logging.getLogger(__name__)

CPU_KV_CACHE_BYTES = 512 * 2**20  # at most; vLLM's own VLLM_CPU_KVCACHE_SPACE (GiB) overrides it
# vLLM's defaults: sequences that are sampled at a time, and tokens in a block of the KV cache.
CPU_MAX_SEQUENCES, CPU_BLOCK = 256, 128


class RolloutActor:
    """One vLLM engine. OpenRLHF's RolloutRayActor serves single requests asynchronously; a rollout is one batch, and
    handing vLLM the whole batch before its first step makes the schedule, and so the samples, repeatable.

    The weight-sync methods carry OpenRLHF's names: its `broadcast_to_vllm` calls them.
    """

    def __init__(self, bundle_indices: list[int] | None, num_gpus: float, engine_settings: dict):
        if engine_settings["distributed_executor_backend"] == "ray":
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # vLLM's own Ray workers choose
        elif ray_noset_visible_devices() and cpu.has_cuda():
            os.environ["CUDA_VISIBLE_DEVICES"] = str(ray.get_gpu_ids()[0])
        if bundle_indices is not None:
            os.environ["VLLM_RAY_PER_WORKER_GPUS"] = str(num_gpus)
            os.environ["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundle_indices))
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # dtypes and shapes travel through collective_rpc

        cpu.keep_vllm_weights_loadable()
        import vllm

        if not cpu.has_cuda():
            engine_settings |= {"kv_cache_memory_bytes": cpu_kv_cache_bytes(engine_settings)}
        self.llm = vllm.LLM(**engine_settings)

    def ready(self) -> bool:
        return True

    def generate(
        self, prompt_ids: list[list[int]], seeds: list[int], settings: SamplingSettings
    ) -> list[list[Completion]]:
        """`samples_per_prompt` completions of each prompt."""
        requests = [
            Request(
                *(ids, seed, settings.temperature, settings.top_p),
                max_tokens=settings.max_new_tokens or settings.max_len - len(ids),
            )
            for ids, seed in zip(prompt_ids, seeds, strict=True)
        ]
        return self._sample(requests, settings.samples_per_prompt)

    def complete(self, requests: list[Request]) -> list[Completion]:
        return [completion for (completion,) in self._sample(requests, 1)]

    def _sample(self, requests: list[Request], count: int) -> list[list[Completion]]:
        """`count` completions of each."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = [
            SamplingParams(
                n=count,
                seed=request.seed,
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens,
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [TokensPrompt(prompt_token_ids=request.ids) for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            [
                Completion(
                    ids=list(completion.token_ids),
                    log_probs=[
                        entry[token].logprob
                        for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
                    ],
                    truncated=completion.finish_reason == "length",
                )
                for completion in output.outputs
            ]
            for output in outputs
        ]

    def workers(self, method: str, *arguments) -> list:
        """WeightWorker.method(*arguments) in each of the engine's workers."""
        return self.llm.collective_rpc(method, args=arguments)

    def weight_sums(self) -> tuple[list[dict], dict]:
        return self.workers("weight_sums"), self.workers("packed_modules")[0]

    def init_process_group(self, address, port, rank_offset, world_size, group_name, backend, use_ray):
        return self.llm.collective_rpc(
            "init_process_group", args=(address, port, rank_offset, world_size, group_name, backend, use_ray)
        )

    def update_weight(self, name, dtype, shape, empty_cache=False):
        return self.llm.collective_rpc("update_weight", args=(name, dtype, shape, empty_cache))

    def update_weight_cuda_ipc(self, name, dtype, shape, ipc_handles, empty_cache=False):
        return self.llm.collective_rpc("update_weight_cuda_ipc", args=(name, dtype, shape, ipc_handles, empty_cache))

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        self.llm.sleep(level=level)

    def wake_up(self, tags: tuple[str, ...] = ("weights", "kv_cache")) -> None:
        for tag in tags:  # vLLM passes over a tag that is awake, but only one at a time
            self.llm.wake_up(tags=[tag])


def cpu_kv_cache_bytes(engine_settings: dict) -> int:
    """Room for as many sequences as vLLM samples at a time, or what the settings say where that is less: vLLM writes
    zeros into all of it at the start."""
    import vllm

    model = vllm.EngineArgs(**engine_settings).create_model_config()
    values = 2 * model.get_total_num_hidden_layers() * model.get_total_num_kv_heads() * model.get_head_size()
    blocks = 1 + CPU_MAX_SEQUENCES * -(-engine_settings["max_model_len"] // CPU_BLOCK)  # one is vLLM's own
    return min(engine_settings["kv_cache_memory_bytes"], blocks * CPU_BLOCK * values * model.dtype.itemsize)


@dataclass(frozen=True)
class EnginePlan:
    """The engines of a run, and what vLLM needs to know."""

    model: str
    count: int
    tensor_parallel: int
    dtype: str  # bf16, fp16 or fp32
    max_len: int
    seed: int
    eager: bool
    prefix_caching: bool
    sleeps: bool  # weights and KV cache leave the GPU while the policy trains
    gpu_memory_utilization: float
    trust_remote_code: bool
    timeout: float
    colocated: bool  # on the policy's GPUs
    buckets: bool  # weights are synced in buckets, else as OpenRLHF does it
    max_restarts: int = 0  # of engines that died

    def vllm_settings(self, index: int) -> dict:
        settings = {
            "model": self.model,
            "worker_extension_cls": "openrlhf_apo.cluster.vllm_worker.WeightWorker",
            "tensor_parallel_size": self.tensor_parallel,
            "distributed_executor_backend": "uni" if self.tensor_parallel == 1 else "ray",
            "seed": self.seed + index,
            "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[self.dtype],
            "max_model_len": self.max_len,
            "enforce_eager": self.eager,
            "enable_prefix_caching": self.prefix_caching,
            "enable_sleep_mode": self.sleeps,
            "trust_remote_code": self.trust_remote_code,
            "logprobs_mode": "processed_logprobs",  # of the distribution that was sampled from
            "disable_log_stats": True,
        }
        if cpu.has_cuda():
            return settings | {"gpu_memory_utilization": self.gpu_memory_utilization}
        # gpu_model_runner.py:3785 rewinds a seeded request's generator when its prompt was cut by chunked prefill; a
        # CPU generator cannot be rewound.
        return settings | {
            "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
            "max_num_seqs": CPU_MAX_SEQUENCES,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, self.max_len),
        }


def create_engine(plan: EnginePlan, pg: PlacementGroup, i: int) -> ActorHandle:
    """The i-th RolloutActor."""
    tp = plan.tensor_parallel
    share = 0.2 if plan.colocated else 1
    num_gpus = share if tp == 1 else 0  # with TP, vLLM's own Ray workers hold the GPUs
    bundles = get_bundle_indices(pg, i, tp) if tp > 1 else None
    place = PlacementGroupSchedulingStrategy(
        placement_group=pg,
        placement_group_capture_child_tasks=True,
        placement_group_bundle_index=bundles[0] if bundles else i,
    )
    actor = ray.remote(RolloutActor).options(num_cpus=num_gpus, num_gpus=num_gpus, scheduling_strategy=place)
    return actor.remote(bundles, share, plan.vllm_settings(i))


class RayEngine:
    """EngineHandle over RolloutActors. Each prompt's seed follows from the run's seed and the prompt's group id, so
    samples do not depend on which engine makes them, nor on how often one was replaced."""

    own_weights = True

    def __init__(self, engines: list, pg: PlacementGroup, policy: "RayPolicy", tokenizer, plan: EnginePlan):
        self.engines, self.pg, self.policy, self.tokenizer, self.plan = engines, pg, policy, tokenizer, plan
        self.restarts = 0
        self._connect()

    def _connect(self) -> None:
        if self.plan.buckets:
            self.policy.call_actors("connect_engines", *self._sender())

    def _sender(self) -> tuple:
        """The kind of sender, and its arguments."""
        if not cpu.has_cuda():
            return ObjectStore, self.engines
        if self.plan.colocated:
            return CudaIpc, self.engines
        return Broadcast, self.engines, self.plan.tensor_parallel, "nccl"

    def generate(
        self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None = None
    ) -> list[Sample]:
        return self.begin(prompts, settings, prefix)()

    def begin(self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None = None) -> Pending:
        def begin() -> Pending:
            return self._begin(prompts, settings, prefix)

        begun = [self._surviving(begin)]  # once: after an engine's death all begins anew
        return lambda: self._surviving(lambda: (begun.pop() if begun else begin())())

    def complete(self, requests: list[Request]) -> list[Completion]:
        return self._surviving(lambda: self._complete(requests))

    def rest(self) -> None:
        if self.plan.sleeps:
            self._surviving(self._rest)

    def sync_weights(self) -> None:
        self._surviving(self._sync_weights)

    def _surviving(self, call: Callable[[], T]) -> T:
        """call(), again after each engine that died in it was replaced."""
        while True:
            try:
                return call()
            except ProcessDied as error:
                if self.restarts >= self.plan.max_restarts or not self._replace_dead(error):
                    raise

    def _replace_dead(self, error: ProcessDied) -> bool:
        """Whether it was an engine that died. The new ones have the policy's weights."""
        alive = []
        for engine in self.engines:
            try:
                alive.append(get_all([engine.ready.remote()], self.plan.timeout, "an engine")[0])
            except ProcessDied:
                alive.append(False)
        for i in (i for i, lives in enumerate(alive) if not lives):
            self.restarts += 1
            logger.warning(
                "%s; engine %d starts anew, restart %d of %d", *(error, i), self.restarts, self.plan.max_restarts
            )
            self.engines[i] = create_engine(self.plan, self.pg, i)
        if not all(alive):
            self._all("ready")
            self._connect()
            self._sync_weights()
        return not all(alive)

    def _begin(self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None) -> Pending:
        self._wake()
        beginnings = [encode(self.tokenizer, prompt, settings, prefix) for prompt in prompts]
        seeds = [seed_of(prompt, settings, guided=prefix is not None) for prompt in prompts]
        completions = self._deal(
            len(prompts),
            lambda engine, share: engine.generate.remote(
                [beginnings[i].ids for i in share], [seeds[i] for i in share], settings
            ),
        )

        def samples() -> list[Sample]:
            found = completions()
            if self.plan.sleeps:
                self._all("sleep")
            return samples_of(self.tokenizer, prompts, beginnings, found)

        return samples

    def _complete(self, requests: list[Request]) -> list[Completion]:
        self._wake()
        return self._deal(len(requests), lambda engine, share: engine.complete.remote([requests[i] for i in share]))()

    def _deal(self, count: int, ask: Callable[[ActorHandle, range], ObjectRef]) -> Callable[[], list]:
        """Begin one answer to each of `count` questions; what waits for them, in their order. ask: an engine for those
        of its share."""
        shares = [range(k, count, len(self.engines)) for k in range(min(count, len(self.engines)))]
        refs = [ask(engine, share) for engine, share in zip(self.engines, shares, strict=False)]

        def answers() -> list:
            found: dict = {}
            for share, each in zip(shares, get_all(refs, self.plan.timeout, "generation"), strict=True):
                found |= dict(zip(share, each, strict=True))
            return [found[i] for i in range(count)]

        return answers

    def _wake(self) -> None:
        if self.plan.sleeps:
            self.policy.release_memory()
            self._all("wake_up")

    def _rest(self) -> None:
        self._wake()  # after a sync the weights alone are awake, and vLLM passes over an engine that is half asleep
        self._all("sleep")

    def _sync_weights(self) -> None:
        self.policy.sleep()
        if self.plan.sleeps:
            self.policy.release_memory()
            self._all("wake_up", ("weights",))
        if not self.plan.buckets:
            self.policy.call_actors("broadcast_to_vllm")
            return
        if self.plan.prefix_caching:
            self._all("reset_prefix_cache")
        self.policy.call_actors("send_weights")
        self._all("workers", "finish_sync")

    def check_weights(self) -> None:
        """That every weight of the engine was written, and Σ w and Σ w² of every tensor."""
        if self.plan.buckets:
            for workers in self._all("workers", "unwritten_weights"):
                for missing in workers:
                    refuse_unwritten(missing)
        trained = self.policy.call_actors("weight_sums")[0]
        refs = [engine.weight_sums.remote() for engine in self.engines]
        for workers, packed in get_all(refs, self.plan.timeout, "weight check"):
            compare_weight_sums(trained, workers, packed)

    def _all(self, method: str, *arguments) -> list:
        refs = [getattr(engine, method).remote(*arguments) for engine in self.engines]
        return get_all(refs, self.plan.timeout, f"the engine's {method}")
