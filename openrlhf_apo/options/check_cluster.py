"""Settings that DeepSpeed, vLLM or Ray would refuse late, in an actor, or take without a word for something else."""

from types import SimpleNamespace

from openrlhf_apo import cpu
from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import OPENRLHF


def check_cluster(args: SimpleNamespace) -> None:
    if cpu.has_cuda():
        _check_flash_attention(args)
    else:
        _check_cpu(args)
    _check_deepspeed(args)
    if args.ds.lora.rank:
        _check_lora(args)
    _check_ranks(args)
    _check_placement(args)


def _check_flash_attention(args: SimpleNamespace) -> None:
    if "flash" in args.ds.attn_implementation and not cpu.has_flash_attn():
        raise OptionError(
            f"--ds.attn_implementation {args.ds.attn_implementation} needs the package flash-attn (docs/gpu.md): use "
            "sdpa without --ds.packing_samples, or install it"
        )


def _check_cpu(args: SimpleNamespace) -> None:
    if "flash" in args.ds.attn_implementation:
        raise OptionError(f"--ds.attn_implementation {args.ds.attn_implementation} needs a GPU: use sdpa")
    if args.apo.sync == "openrlhf":
        raise OptionError("--apo.sync openrlhf needs a GPU: drop it")
    if args.ds.param_dtype == "fp16":
        raise OptionError("--ds.param_dtype fp16 needs a GPU: use fp32 or bf16")


def _check_deepspeed(args: SimpleNamespace) -> None:
    stage, ours = args.ds.zero_stage, args.loss != OPENRLHF
    if args.ds.enable_sleep and stage == 0:
        raise OptionError("--ds.enable_sleep needs --ds.zero_stage 1, 2 or 3: DeepSpeed moves no states without ZeRO")
    if args.actor.optim == "muon" and stage not in (1, 2):
        what = "raises beside its reduce-scatter" if stage == 3 else "is plain SGD without ZeRO"
        raise OptionError(f"--actor.optim muon needs --ds.zero_stage 1 or 2, not {stage}: DeepSpeed's Muon {what}")
    if args.actor.optim == "muon" and args.ds.adam_offload:
        raise OptionError("--ds.adam_offload cannot be used with --actor.optim muon, which DeepSpeed refuses: drop it")
    if args.ds.overlap_comm and ours and stage < 2:
        raise OptionError(
            f"--ds.overlap_comm needs --ds.zero_stage 2 or 3 with --loss {args.loss}, not {stage}: drop it (DeepSpeed "
            "refuses it beside unmanaged accumulation)"
        )
    if stage < 3 and args.ds.grad_accum_dtype not in (None, args.ds.param_dtype):
        why = (
            "DeepSpeed has no engine for the two",
            "a step without gradient would stop the run",
            "DeepSpeed adds up in the weights' own dtype there",
        )
        raise OptionError(
            f"--ds.grad_accum_dtype {args.ds.grad_accum_dtype} beside --ds.param_dtype {args.ds.param_dtype} needs "
            f"ZeRO 3 ({why[stage]}): drop it, or use --ds.zero_stage 3"
        )
    if args.ds.tensor_parallel_size > 1 and args.ds.param_dtype != "bf16":
        raise OptionError(f"--ds.tensor_parallel_size needs --ds.param_dtype bf16, not {args.ds.param_dtype}")


def _check_lora(args: SimpleNamespace) -> None:
    if args.apo.sync == "openrlhf":
        raise OptionError(
            "--apo.sync openrlhf cannot be used with --ds.lora.rank: drop it (it sends the adapter's tensors, which "
            "vLLM does not know; OpenRLHF issue 1349)"
        )
    if args.ds.tensor_parallel_size > 1:
        raise OptionError(
            "--ds.tensor_parallel_size cannot be used with --ds.lora.rank: drop one (DeepSpeed would split the layers "
            "inside the adapter's)"
        )
    if args.ds.load_in_4bit and args.ds.param_dtype != "bf16":
        raise OptionError(f"--ds.load_in_4bit needs --ds.param_dtype bf16, not {args.ds.param_dtype}")
    if args.ds.load_in_4bit and args.ds.zero_stage == 3:
        raise OptionError("--ds.load_in_4bit needs --ds.zero_stage 0, 1 or 2: ZeRO-3 cannot shard packed weights")
    if args.train.enable_ema:
        raise OptionError(
            "--train.enable_ema cannot be used with --ds.lora.rank: drop one (OpenRLHF averages two models that must "
            "have the same tensors)"
        )


def _check_ranks(args: SimpleNamespace) -> None:
    """Batches can be dealt to the ranks, of which those of a ring or of tensor parallelism do the same work."""
    actors, together = _actors(args), args.ds.ring_attn_size * args.ds.tensor_parallel_size
    if actors % together:
        raise OptionError(
            f"--ds.ring_attn_size {args.ds.ring_attn_size} x --ds.tensor_parallel_size {args.ds.tensor_parallel_size} "
            f"ranks work together: the actor's {actors} GPUs are not made of groups of {together}"
        )
    ranks, micro = actors // together, args.train.micro_batch_size
    if args.loss == OPENRLHF and args.train.batch_size % (micro * ranks):
        raise OptionError(
            f"--train.batch_size {args.train.batch_size} is not a multiple of --train.micro_batch_size {micro} x "
            f"{ranks} ranks"
        )


def _check_placement(args: SimpleNamespace) -> None:
    """Models that share GPUs are on equally many."""
    actors, engines = _actors(args), args.vllm.num_engines * args.vllm.tensor_parallel_size
    if args.train.colocate_all and not args.apo.load_rollouts and engines != actors:
        raise OptionError(
            f"--vllm.num_engines x --vllm.tensor_parallel_size is {engines}, and must be {actors} with "
            f"--train.colocate_all, where the engines are on the actor's {actors} GPUs"
        )
    reward = (args.reward.num_nodes, args.reward.num_gpus_per_node)
    if args.train.colocate_all and args.reward.model_name_or_path:
        if reward != (args.actor.num_nodes, args.actor.num_gpus_per_node):
            raise OptionError(
                "--reward.num_nodes and --reward.num_gpus_per_node must be the actor's with --train.colocate_all, "
                "where they share GPUs: drop them"
            )
    shared = args.train.colocate_all or args.train.colocate_actor_ref
    reference = (args.ref.num_nodes, args.ref.num_gpus_per_node)
    if args.loss == OPENRLHF and shared and args.algo.kl.init_coef > 0:
        if reference != (args.actor.num_nodes, args.actor.num_gpus_per_node):
            raise OptionError(
                "--ref.num_nodes and --ref.num_gpus_per_node must be the actor's where they share GPUs: drop them"
            )


def _actors(args: SimpleNamespace) -> int:
    return args.actor.num_nodes * args.actor.num_gpus_per_node
