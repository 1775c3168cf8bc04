"""Starts Ray, and beside it what takes as long: the imports of a run's driver."""

import copy
import logging
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import TextIO

import ray

# DeepSpeed asks for distutils; the finder that answers imports setuptools, which asks for a logger, under Python's
# import lock. ray.init forks, which takes the locks of logging and of imports in that order: both at once, the two
# can wait for ever (seen twice, on busy cores). What is imported already is not looked for.
import setuptools  # noqa: F401

from openrlhf_apo import cpu
from openrlhf_apo.cpu import patches
from openrlhf_apo.errors import ProcessDied, RunError
from openrlhf_apo.trainer.placement import Placement
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.stop import StopSignals

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10
# For a run on this machine alone: nothing of it listens where another machine could reach it.
LOOPBACK_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": patches.LOOPBACK,
}


def train(plan: RunPlan, args: SimpleNamespace, console: TextIO, stop: StopSignals) -> None:
    """Run `plan` to its end. args: OpenRLHF's settings, which its own parts read. console: for the live view.

    Where a process of the run dies, all start anew from the last checkpoint, as often as the plan allows.
    """
    while True:
        try:
            with ThreadPoolExecutor(1) as pool:
                launch = pool.submit(import_module, "openrlhf_apo.cluster.launch")  # OpenRLHF and DeepSpeed
                start_ray(args, plan.placement)
            stop.install()  # Ray has put a handler of its own in place
            # A copy: what a run has learned of alpha, say, is in its checkpoints, or is to be learned anew.
            launch.result().train(copy.deepcopy(plan), args, console, stop)
            return
        except ProcessDied as error:
            if plan.restarts == plan.max_restarts:
                raise
            plan = replace(plan, restarts=plan.restarts + 1, output=replace(plan.output, resume=True))
            args.ckpt.load_enable = True  # what OpenRLHF's actor reads
            logger.warning("%s; restart %d of %d", error, plan.restarts, plan.max_restarts)
        finally:
            ray.shutdown()


def start_ray(args: SimpleNamespace, placement: Placement) -> None:
    """Join the cluster of RAY_ADDRESS, or start one here, for this machine alone."""
    needed = sum(placement.groups.values())
    environment = {
        cpu.DEVICE: os.environ[cpu.DEVICE],
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
        "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN"),
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": os.environ.get("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1"),
    }
    # ninja lies beside the interpreter, and what compiles at first use calls it by name.
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    if cpu.has_cuda():
        # torch.cuda.is_available() then asks the driver library, and initialises no CUDA before a process has chosen
        # its device.
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    else:
        threads = max(1, (os.cpu_count() or 1) // (args.actor.num_nodes * args.actor.num_gpus_per_node))
        environment |= {name: os.environ.get(name, value) for name, value in cpu.CPU_ENVIRONMENT.items()}
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    if address := os.environ.get("RAY_ADDRESS"):
        refuse_silent(address)
    settings = {"log_to_driver": args.logger.actor_logs, "logging_level": "warning"}
    if address:
        settings["runtime_env"] = {"env_vars": environment}
    else:
        environment |= {name: os.environ.get(name, value) for name, value in LOOPBACK_ENVIRONMENT.items()}
        # Inherited, so that the workers that Ray starts with itself can be the actors.
        os.environ.update(environment)
        patches.keep_ray_on_loopback()
        # "local", since without it ray.init joins whatever cluster a file on this machine names.
        settings |= {"address": "local", "include_dashboard": False, "_node_ip_address": patches.LOOPBACK}
        if not cpu.has_cuda():
            # OpenRLHF asks Ray for GPUs; here they are only a count that places one actor each. Ray starts a worker
            # for every CPU, which imports what all actors need while the driver is still busy; the soft limit keeps it
            # when the placement groups have taken the CPUs.
            settings |= {"num_gpus": needed, "num_cpus": needed}
            settings["_system_config"] = {
                "preload_python_modules": ["openrlhf_apo.cluster.engine"],
                "num_workers_soft_limit": needed,
                "task_events_report_interval_ms": 0,  # which gcs_server would keep a record of
            }
    ray.init(**settings)
    resources = ray.cluster_resources()
    if not cpu.has_cuda() and any(name.startswith("accelerator_type:") for name in resources):
        raise RunError("this machine has no GPU, the Ray cluster has: give --apo.device cuda (or cpu, if you mean it)")
    have = int(resources.get("GPU", 0))
    if have < needed:
        raise RunError(
            f"the run needs {needed} GPUs, the Ray cluster has {have}: lower --actor.num_gpus_per_node, "
            "--vllm.num_engines, --ref.num_gpus_per_node or --reward.num_gpus_per_node, or share GPUs with "
            "--train.colocate_all"
        )


def refuse_silent(address: str) -> None:
    """ray.init would wait for minutes, without a word, for a head node that is not there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # "auto", "local": Ray knows what to do
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"no Ray head answers at RAY_ADDRESS {address} ({error.strerror or 'timed out'}): start it by `ray start "
            "--head`, or unset RAY_ADDRESS to run on this machine alone"
        ) from None
