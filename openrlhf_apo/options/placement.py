"""Which GPUs a run on Ray asks for."""

from types import SimpleNamespace

from openrlhf_apo.objectives import OPENRLHF
from openrlhf_apo.trainer.placement import Placement


def placement(args: SimpleNamespace) -> Placement:
    """Without CUDA a GPU is a count only, by which each process has its place."""
    # OpenRLHF's own reference model; other losses have theirs in the policy's actors.
    wants_reference = args.loss == OPENRLHF and args.algo.kl.init_coef > 0
    wants_reward = args.reward.model_name_or_path is not None
    shared: tuple[str, ...] = ()
    if args.train.colocate_all:
        shared = ("engines", "reference", "reward")
    elif args.train.colocate_actor_ref:
        shared = ("reference",)
    return Placement(
        policy=args.actor.num_nodes * args.actor.num_gpus_per_node,
        engines=0 if args.apo.load_rollouts else args.vllm.num_engines * args.vllm.tensor_parallel_size,
        reference=args.ref.num_nodes * args.ref.num_gpus_per_node if wants_reference else 0,
        reward=args.reward.num_nodes * args.reward.num_gpus_per_node if wants_reward else 0,
        shared=shared,
    )
