"""The patches: one function each, with the upstream line it answers to.

openrlhf 0.11.2, deepspeed 0.19.6, vllm 0.29.0, bitsandbytes 0.50.2. `tests/test_patches.py` fails when one of those
lines moves.
"""

import importlib
import importlib.machinery
import importlib.util
import socket
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LOOPBACK = "127.0.0.1"


def import_openrlhf_without_flash_attn() -> None:
    """openrlhf/models/ring_attn_utils.py:3-4 imports flash_attn unconditionally.

    Where flash-attn is absent, placeholders stand in for the four names during that one import and are removed
    again, so that transformers and vLLM still see that there is no flash-attn.
    """
    if "openrlhf.models.ring_attn_utils" in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        return

    def unavailable(*args, **kwargs):
        raise RuntimeError("flash-attn is not installed: drop --ds.packing_samples and --ds.ring_attn_size")

    names = {
        "flash_attn": [],
        "flash_attn.bert_padding": ["index_first_axis", "pad_input", "rearrange", "unpad_input"],
        "flash_attn.utils": [],
        "flash_attn.utils.distributed": ["all_gather"],
    }
    for module_name, functions in names.items():
        module = types.ModuleType(module_name)
        module.__spec__ = importlib.machinery.ModuleSpec(module_name, loader=None)
        for function in functions:
            setattr(module, function, unavailable)
        sys.modules[module_name] = module
    # The file is loaded by itself: importing the package openrlhf.models first would import everything else
    # (transformers, peft) while the placeholders are visible.
    spec = importlib.util.spec_from_file_location(
        "openrlhf.models.ring_attn_utils",
        next(iter(importlib.util.find_spec("openrlhf").submodule_search_locations)) + "/models/ring_attn_utils.py",
    )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        for module_name in names:
            del sys.modules[module_name]
    sys.modules[spec.name] = module


def allow_float32_parameters() -> None:
    """openrlhf/utils/utils.py:9-24: `convert_to_torch_dtype` knows bf16 and fp16; the CPU default here is fp32."""
    import openrlhf.utils.utils as upstream

    original = upstream.convert_to_torch_dtype
    if original.__module__ == __name__:
        return

    def convert_to_torch_dtype(param_dtype: str) -> torch.dtype:
        return torch.float32 if param_dtype == "fp32" else original(param_dtype)

    upstream.convert_to_torch_dtype = convert_to_torch_dtype


def keep_stores_on_loopback() -> None:
    """torch/distributed/rendezvous.py:199: a process group's store listens on every interface, whatever its host.

    Where its host is the loopback address, all ranks are on this machine, and it listens there alone.
    """
    upstream = importlib.import_module("torch.distributed.rendezvous")  # the attribute of that name is a function
    original = upstream.TCPStore
    if original.__module__ == __name__:
        return

    def loopback_store(host_name: str, port: int, is_master: bool, **settings) -> torch.distributed.Store:
        if is_master and host_name == LOOPBACK:
            listener = socket.create_server((host_name, port))
            settings["master_listen_fd"] = listener.detach()  # the store's from here on
        return original(host_name, port, is_master=is_master, **settings)

    upstream.TCPStore = loopback_store


def keep_ray_on_loopback() -> None:
    """ray/_private/worker.py:1817 replaces the node address 127.0.0.1 by one that other machines reach.

    Ray's processes (gcs_server, raylet, agents, workers) listen on loopback alone where the node address is 127.0.0.1.
    """
    import ray._private.services as upstream

    upstream.resolve_ip_for_localhost = lambda host: host


class CpuDevice(str):
    """A device that is "cpu" for `tensor.to(...)` and "0" for `f"cuda:{device}"` (replay_buffer.py:40)."""

    def __format__(self, spec: str) -> str:
        return "0"


def point_torch_cuda_at_the_cpu() -> None:
    """deepspeed.py:97, ppo_actor.py:171,436,605,627, launcher.py:65,136, distributed_util.py:10 call these four."""
    torch.cuda.current_device = lambda: CpuDevice("cpu")
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None


def skip_deepspeed_shared_memory_build() -> None:
    """deepspeed/comm/torch.py:31,191: `TorchBackend` JIT-compiles a collective library; gloo serves as well."""
    # Not `import deepspeed.comm.torch as ...`: that name is the torch library, imported there.
    upstream = importlib.import_module("deepspeed.comm.torch")
    upstream.build_shm_op = lambda: None


def keep_4bit_weights_as_loaded() -> None:
    """bitsandbytes/nn/modules.py:573,611: on a CPU with AVX512-BF16 a forward without gradient packs a weight anew.

    That rounds its scales for good, the kernel that reads it has no gradient, and what unpacks weights for an engine
    or a checkpoint takes it for the old form, all without an error.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    upstream = importlib.import_module("bitsandbytes.nn.modules")  # peft has imported bitsandbytes where it is
    upstream.has_avx512bf16 = lambda: False


def keep_vllm_weights_unpacked() -> None:
    """vllm/model_executor/layers/utils.py:434 packs each weight for its CPU kernel and frees the original.

    A packed weight cannot be loaded again, and a tied lm_head goes stale without an error.
    """
    import vllm.model_executor.layers.utils as upstream

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    upstream.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def pack_experts_again(model: torch.nn.Module) -> None:
    """vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py:150 packs a layer's experts for its CPU
    kernel when the model is loaded, and not when weights are loaded again.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None and "w13_weight" in layer._parameters:
            kernel.fused_experts.process_weights_after_loading(layer)


@contextmanager
def without_deepspeed() -> Iterator[None]:
    """accelerate/utils/other.py:310 imports deepspeed where it is installed, 2 s and 70 MB, when transformers saves
    a model, to see whether that is one of its engines. Within this context deepspeed is not installed.
    """
    imported = sys.modules.pop("deepspeed", None)
    sys.modules["deepspeed"] = None  # Python's own way to say so
    try:
        yield
    finally:
        del sys.modules["deepspeed"]
        if imported is not None:
            sys.modules["deepspeed"] = imported
