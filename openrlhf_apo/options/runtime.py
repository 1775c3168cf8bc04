"""Which runtime a run is on: everything in this process (embedded), or Ray, DeepSpeed and vLLM (ray)."""

import argparse
import os

from openrlhf_apo import cpu
from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import OPENRLHF

# By prefix, what only Ray, DeepSpeed or vLLM read.
ONLY_RAY = (
    "vllm.",
    "ds.",
    "ref.",
    "reward.num_",
    "reward.offload",
    "actor.num_",
    "actor.optim",
    "actor.muon.",
    "train.colocate_",
    "train.full_determinism_enable",
    "ckpt.save_hf",
    "ckpt.disable_ds",
    "apo.check_weights",
    "apo.sync",
    "apo.timeout",
    "train.max_restarts",
    "rollout.max_engine_restarts",
    "logger.actor_logs",
)
BOTH = ("ds.param_dtype", "ds.attn_implementation", "ds.lora.", "ds.value_head_prefix")


def needs_ray(flag: str) -> bool:
    return flag.startswith(ONLY_RAY) and not flag.startswith(BOTH)


def decide_runtime(args: argparse.Namespace, given: set[str]) -> str:
    """embedded or ray. auto: embedded without CUDA, for one rank, where no address and no given flag asks for Ray.

    Raises OptionError for what --runtime embedded cannot do, with the way out.
    """
    reasons = [f"--{flag}" for flag in sorted(given) if needs_ray(flag)]
    reasons += [f"--loss {OPENRLHF}"] if args.loss == OPENRLHF else []
    dtype = getattr(args, "ds.param_dtype")
    if "ds.param_dtype" in given and dtype != "fp32":  # there are no float32 master weights
        reasons.append(f"--ds.param_dtype {dtype}")
    if args.runtime == "embedded":
        if reasons:
            raise OptionError(f"{reasons[0]} has no effect with --runtime embedded: drop it, or use --runtime ray")
        return "embedded"
    if args.runtime == "auto" and not cpu.has_cuda() and not os.environ.get("RAY_ADDRESS") and not reasons:
        return "embedded"
    return "ray"
