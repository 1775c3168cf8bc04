"""Everything the real pipeline needs to run without CUDA, and nothing else.

Where CUDA is present, `install` only stands in for a missing flash-attn. Which of the two a run is, its driver decides
once (`decide`) and hands to every process by an environment variable, because what a process sees says little: Ray
hides the GPUs from an actor that asks for none, and a cluster's head may have none itself.
"""

import os
from importlib.util import find_spec
from typing import Literal

DEVICE = "OPENRLHF_APO_DEVICE"  # cpu or cuda, in every process of a run

# Read by the processes of the run; a value the user has set wins.
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",  # DeepSpeed would probe for an accelerator
    "TORCHDYNAMO_DISABLE": "1",  # torch.compile needs a C++ compiler and 12 s cold
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core lives in its Ray actor: 10 s and a process less
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # one core list per process would fight with Ray's
    # Engine and policy take turns on the same cores: waiting threads must not spin. With 1 ms of it (torch's libgomp:
    # GOMP_SPINCOUNT 100000) the tiny run's rollouts take as long on two cores, 1.8 s to update and 1.0 s to
    # generate, medians of 2 x 6 each; beside another busy program 14 s and 9 s.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_worker_niceness": "0",  # Ray's default of 15 starves the run beside any other busy program
}


def has_cuda() -> bool:
    """Whether the run is one on GPUs: as its driver decided, else what this process sees."""
    return os.environ[DEVICE] == "cuda" if DEVICE in os.environ else _sees_cuda()


def has_flash_attn() -> bool:
    """Whether flash-attn is installed here, as it is then on all machines of the run."""
    return find_spec("flash_attn") is not None


def decide(device: Literal["auto", "cpu", "cuda"]) -> None:
    """Decide for this process and those that inherit its environment. auto: by what this process sees."""
    if device == "auto":
        device = "cuda" if _sees_cuda() else "cpu"
    os.environ[DEVICE] = device


def _sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def install() -> None:
    """Make openrlhf and vLLM importable and runnable in this process. Idempotent."""
    from openrlhf_apo.cpu import patches

    patches.allow_float32_parameters()
    patches.keep_stores_on_loopback()
    patches.import_openrlhf_without_flash_attn()
    if not has_cuda():
        for name, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        patches.point_torch_cuda_at_the_cpu()


def install_for_ranks() -> None:
    """The same for DeepSpeed, which an engine's process has no use for."""
    from openrlhf_apo.cpu import patches

    install()
    if not has_cuda():
        patches.skip_deepspeed_shared_memory_build()
        patches.keep_4bit_weights_as_loaded()


def keep_vllm_weights_loadable() -> None:
    """Before a vLLM engine is built in this process without CUDA: leave linear weights as the checkpoint has them."""
    from openrlhf_apo.cpu import patches

    if not has_cuda():
        patches.keep_vllm_weights_unpacked()
