"""What each of OpenRLHF's flags does here, stated once: checks (effects.py) and docs/openrlhf_flags.md follow from it.

When a flag that works has no effect all the same, for want of another flag, is said in conditions.py.
"""

from openrlhf_apo.objectives import GROUP_LOSSES, OPENRLHF
from openrlhf_apo.options.uses import GPU, Flag, Use, differs, gpu, nowhere, only_openrlhf, ours, works
from openrlhf_apo.trainer.handles import EMA_FOLDER

COUNT = {"within": "[1, inf)"}
EVERY = {"within": "[1, inf)", "beside": -1}  # -1: never
SHARE = {"within": "[0, 1]"}
NOT_NEGATIVE = {"within": "[0, inf)"}
CPU_TOKENS = 4096  # of a micro-batch without CUDA

# transformers' schedulers that need no more than the numbers of warm-up and training steps, as OpenRLHF gives no more.
SCHEDULERS_WITH_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *SCHEDULERS_WITH_MIN_LR,
)

_OWN_SURROGATE = "--loss says which it is"
_OWN_ADVANTAGES = "advantages are the loss's own"
_OWN_REFERENCE = "the reference is a second set of weights in the policy's actors"
_MICRO_BATCHES = "log-probs are taken in the micro-batches of training"
_NO_FILTER = Use(
    "refused",
    "OpenRLHF filters in its own sampler, which this trainer does not use",
    "has no effect with --loss {loss}: drop it, or use another loss",
)
_NO_DROPOUT = Use(
    "refused",
    "log-probs of one answer would differ from forward to forward, and with them log-ratios that are to measure the "
    "policy's change alone",
    "cannot be used with --loss {loss}: drop it, or use --loss openrlhf",
)
_MERGED = "the engine gets merged weights, in buckets (OpenRLHF issue 1349); checkpoints hold the adapter alone"
_TEXT_ONLY = nowhere("prompts are text")
_NO_CRITIC = nowhere("there is no critic")
_OWN_OLD_POLICY = Use(
    "refused",
    "OpenRLHF's own step takes the policy at the start of training for the one that sampled",
    "cannot be used with --loss {loss}: drop it, or use openrlhf.cli.train_ppo_ray",
)
_HARD_CODED = nowhere("OpenRLHF does not hand it to DeepSpeed, whose Muon has 5 steps with Nesterov momentum")

# A name that ends with * stands for all that begin so.
FLAGS: dict[str, Flag] = {
    "actor.adam.lr": works(**NOT_NEGATIVE),
    "actor.adam.betas": works(within="[0, 1)"),
    "actor.adam.eps": works(within="(0, inf)"),
    "actor.adam.weight_decay": works(**NOT_NEGATIVE),
    "actor.aux_loss_coef": only_openrlhf(
        "it is a mean over a micro-batch, and would depend on its size",
        Use("works", "for a mixture of experts"),
        **NOT_NEGATIVE,
    ),
    "actor.dual_clip": ours(Use("owner"), within="(1, inf)"),
    "actor.entropy_coef": works("0 only measures"),
    "actor.eps_clip": ours(Use("owner"), **NOT_NEGATIVE),
    "actor.eps_clip_low_high": ours(Use("owner"), **NOT_NEGATIVE),
    "actor.freeze_visual_encoder": _TEXT_ONLY,
    "actor.gradient_checkpointing_enable": works(),
    "actor.gradient_checkpointing_reentrant": works(),
    "actor.loss_agg_mode": only_openrlhf(_OWN_SURROGATE),
    "actor.lr_scheduler": works(choices=SCHEDULERS),
    "actor.lr_warmup_ratio": works(**SHARE),
    "actor.max_norm": works("0: gradients are not clipped, the default with --actor.optim muon", **NOT_NEGATIVE),
    "actor.min_lr_ratio": works(**SHARE),
    "actor.model_name_or_path": works("a model that brings its own code needs --actor.trust_remote_code"),
    "actor.muon.lr": works(**NOT_NEGATIVE),
    "actor.muon.momentum": works(within="[0, 1)"),
    "actor.muon.nesterov": _HARD_CODED,
    "actor.muon.no_nesterov": _HARD_CODED,
    "actor.muon.ns_steps": _HARD_CODED,
    "actor.num_gpus_per_node": differs("without CUDA the default is 1, and it counts processes", **COUNT),
    "actor.num_nodes": works(**COUNT),
    "actor.optim": works("muon: with --ds.zero_stage 1 or 2; embeddings and norms stay with --actor.adam.*"),
    "actor.policy_loss_type": only_openrlhf(_OWN_SURROGATE),
    "algo.advantage.estimator": only_openrlhf(
        _OWN_ADVANTAGES, Use("differs", "the default is group_norm; gae is refused, as there is no critic")
    ),
    "algo.advantage.gamma": only_openrlhf(_OWN_ADVANTAGES, **SHARE),
    "algo.advantage.is_correction_gating": works(),
    "algo.advantage.is_correction_level": Flag(
        Use("differs", "seq: an answer outside has no gradient, the others no weight; q and p are those of the group"),
        Use("works", "of gspo, whose ratio is one of answers, the engine's log-probs take the place of π_old's"),
        Use("works"),
    ),
    "algo.advantage.is_correction_mode": Flag(
        Use(
            "refused",
            "answers are masked: what could be clipped is a weight per token",
            "has no effect with --loss {loss}: drop it",
        ),
        Use("works"),
        Use("works"),
    ),
    "algo.advantage.is_correction_threshold": works("HIGH, or LOW HIGH"),
    "algo.advantage.lambd": nowhere("only --algo.advantage.estimator gae reads it, which needs a critic"),
    "algo.advantage.no_std_norm": only_openrlhf(_OWN_ADVANTAGES),
    "algo.dynamic_filtering_enable": ours(
        Use(
            "differs",
            "on by default for dapo; keeps groups with unequal rewards, and replaces the others in batches of "
            "--rollout.vllm_generate_batch_size from the same episode, at most --apo.max_generations of them; what is "
            "too much is kept for the next rollouts",
        ),
        _NO_FILTER,
    ),
    "algo.dynamic_filtering_range": ours(
        Use("differs", "only where given, beside unequal rewards; of scores where the reward has them"), _NO_FILTER
    ),
    "algo.kl.estimator": ours(Use("differs", "the default is k3 for KL in the loss")),
    "algo.kl.horizon": ours(Use("works", "more than a fifth of a rollout's samples"), **COUNT),
    "algo.kl.init_coef": ours(
        Use("differs", "the default is the loss's: 0.04 for grpo and g2rpo_a, else 0"), **NOT_NEGATIVE
    ),
    "algo.kl.target": ours(Use("differs", "nats per token, for KL in the reward too"), within="(0, inf)"),
    "algo.kl.unbiased_gradient": works(),
    "algo.kl.use_loss": Flag(
        Use("differs", "on by default; group losses have KL nowhere else"),
        Use("differs", "on by default for grpo and g2rpo_a; --algo.kl.no_use_loss: KL in the reward"),
        Use("works"),
    ),
    "ckpt.best_metric_key": differs(
        "a key of metrics.jsonl: eval/pass1 by default (of graded rewards eval/score_mean), or none"
    ),
    "ckpt.disable_ds": works(),
    "ckpt.load_enable": differs(
        "goes on from this trainer's checkpoints; one of openrlhf.cli.train_ppo_ray is refused"
    ),
    "ckpt.max_mem": works(within="(0, inf]"),
    "ckpt.max_num": works(**COUNT),
    "ckpt.output_dir": works("metrics.jsonl lies there, too"),
    "ckpt.path": works(),
    "ckpt.save_hf": works(),
    "ckpt.save_steps": works("-1: never", **EVERY),
    "critic.*": _NO_CRITIC,
    "data.apply_chat_template": works(),
    "data.dataloader_num_workers": nowhere("prompts are read at once, and drawn without a loader"),
    "data.disable_fast_tokenizer": works(),
    "data.image_key": _TEXT_ONLY,
    "data.input_key": differs("the default is `prompt`"),
    "data.input_template": works(),
    "data.label_key": differs(
        "the default is `label`; data without that column has no labels. Where it is given, and for --reward "
        "math_verify, a row without a label is refused. math_verify takes numbers as text and refuses lists and "
        "objects; a reward of your own gets labels as the data has them"
    ),
    "data.max_images_per_prompt": _TEXT_ONLY,
    "data.max_len": differs("a prompt that leaves no room for new tokens stops the run; OpenRLHF cuts it", **COUNT),
    "data.max_samples": works(**COUNT),
    "data.prompt_dataset": works(),
    "data.prompt_probs": works(),
    "data.prompt_split": works(),
    "ds.adam_offload": gpu(),
    "ds.attn_implementation": differs(
        "without CUDA or flash-attn the default is sdpa, and flash attention is refused"
    ),
    "ds.deepcompile": ours(
        Use(
            "refused",
            "DeepSpeed compiles no unmanaged accumulation, by which any number of micro-batches makes a step",
            "cannot be used with --loss {loss}: drop it, or use --loss openrlhf",
        ),
        GPU,
    ),
    "ds.enable_sleep": gpu("with --ds.zero_stage 1, 2 or 3; at 3 DeepSpeed compiles its own Adam, by a CUDA toolkit"),
    "ds.experts_implementation": works("for a mixture of experts"),
    "ds.grad_accum_dtype": works("with --ds.zero_stage 0 that of the parameters", choices=("fp32", "bf16", "fp16")),
    "ds.load_in_4bit": differs(
        "with --ds.lora.rank and --ds.param_dtype bf16, below --ds.zero_stage 3; the engine gets the base unpacked",
        package="bitsandbytes",
    ),
    "ds.lora.alpha": works(within="(0, inf)"),
    "ds.lora.dropout": ours(_NO_DROPOUT, within="[0, 1)"),
    "ds.lora.rank": ours(
        Use("differs", f"{_MERGED}; a reference or an anchor is the policy with another adapter"),
        Use("differs", f"{_MERGED}; the reference is a model of its own"),
        **NOT_NEGATIVE,
    ),
    "ds.lora.target_modules": differs(
        "names of linear layers, each of which must be there; all-linear may be given, too"
    ),
    "ds.overlap_comm": ours(Use("works", "with --ds.zero_stage 2 or 3")),
    "ds.packing_samples": gpu(),
    "ds.param_dtype": differs("without CUDA the default is fp32, and fp16 is refused; vLLM takes the same type"),
    "ds.ring_attn_head_stride": gpu(**COUNT),
    "ds.ring_attn_size": gpu(
        "ring_flash_attn before 0.1.8 imports names that transformers 5.15 no longer has",
        **COUNT,
        package="ring_flash_attn>=0.1.8",
    ),
    "ds.tensor_parallel_size": gpu("with --ds.param_dtype bf16", **COUNT),
    "ds.use_liger_kernel": gpu(package="liger_kernel"),
    "ds.use_universal_ckpt": works(),
    "ds.value_head_prefix": works("value_head_prefix of the reward model's config.json goes before it"),
    "ds.zero_stage": works(within="[0, 3]"),
    "ds.zpg": works(**COUNT),
    "eval.dataset": works(),
    "eval.n_samples_per_prompt": works(**COUNT),
    "eval.split": works(),
    "eval.steps": works("-1: never; --eval.ends: also before the first and after the last rollout", **EVERY),
    "eval.temperature": works("0: greedy", **NOT_NEGATIVE),
    "local_rank": works("launchers set it"),
    "logger.logging_steps": works(**COUNT),
    "logger.tensorboard_dir": works(package="tensorboard"),
    "logger.wandb.group": works(),
    "logger.wandb.key": works(package="wandb"),
    "logger.wandb.org": works(),
    "logger.wandb.project": works(),
    "logger.wandb.run_name": works(),
    "ref.num_gpus_per_node": only_openrlhf(_OWN_REFERENCE, Use("differs", "the default is the actor's"), **COUNT),
    "ref.num_nodes": only_openrlhf(_OWN_REFERENCE, Use("differs", "the default is the actor's"), **COUNT),
    "ref.offload": gpu("also of --apo.anchor reference, and of ADRPO's reference"),
    "reward.clip_range": only_openrlhf("rewards are taken as they are"),
    "reward.model_name_or_path": differs(
        "goes with evaluations and dynamic filtering; beside --reward, both are added up by --reward.weights, its own "
        "weight last; has the policy's tokenizer"
    ),
    "reward.normalize_enable": works("by mean and std of the reward model's config.json"),
    "reward.num_gpus_per_node": differs("the default is the actor's", **COUNT),
    "reward.num_nodes": differs("the default is the actor's", **COUNT),
    "reward.offload": gpu(),
    "reward.overlong_buffer_len": differs(
        "a fifth of --rollout.max_new_tokens for dapo by default; needs that flag, where OpenRLHF would count from "
        "--data.max_len"
    ),
    "reward.overlong_penalty_factor": works(**NOT_NEGATIVE),
    "reward.remote_url": differs(
        "labels arrive as the data has them; a call of a function may take --reward.timeout, 180 s by default, a "
        "request OpenRLHF's five tries of 180 s; what fails stops the run, or counts against --reward.max_failures"
    ),
    "reward.stop_properly_penalty_coef": works(within="(-inf, 1]"),
    "rollout.batch_size": differs("must make whole optimizer steps", **COUNT),
    "rollout.max_new_tokens": works("an answer may end at once; OpenRLHF asks for one token before its end", **COUNT),
    "rollout.max_tokens_per_gpu": only_openrlhf(_MICRO_BATCHES, GPU, **COUNT),
    "rollout.micro_batch_size": only_openrlhf(_MICRO_BATCHES, **COUNT),
    "rollout.n_samples_per_prompt": ours(
        Use("differs", "the default is 8; at least 2"),
        Use("differs", "the default is 8; 1 with --algo.advantage.estimator reinforce and flash_reinforce only"),
        **COUNT,
    ),
    "rollout.temperature": works(within="(0, inf)"),
    "rollout.top_p": works(within="(0, 1]"),
    "rollout.vllm_generate_batch_size": ours(
        Use(
            "differs",
            "prompts that go to the engine at once, at least --rollout.batch_size; without --train.async_enable, too. "
            "What a rollout has no room for is kept for the next ones of the episode",
        ),
        Use(
            "refused",
            "OpenRLHF asks for --train.async_enable beside it",
            "has no effect with --loss {loss}: drop it, or use another loss",
        ),
        **COUNT,
    ),
    "train.agent_func_path": differs(
        "all conversations take their turns together, so that samples do not depend on timing; the agent runs beside "
        "the trainer, a turn has a seed of its own, an environment --reward.timeout for one, 180 s by default"
    ),
    "train.async_enable": ours(
        Use(
            "differs",
            "a rollout is sampled while the one before trains; log-ratios compare with the policy that sampled it "
            "(--apo.old_log_probs). In the embedded runtime it is sampled before that, and nothing is faster",
        ),
        _OWN_OLD_POLICY,
    ),
    "train.async_queue_size": nowhere(
        "one rollout is ahead, always: the engine gets new weights between two rollouts, so that more in a queue "
        "would be older, and no step faster"
    ),
    "train.batch_size": differs("must be whole groups of --rollout.n_samples_per_prompt", **COUNT),
    "train.colocate_actor_ref": only_openrlhf(_OWN_REFERENCE),
    "train.colocate_all": works(),
    "train.colocate_critic_reward": _NO_CRITIC,
    "train.dynamic_batch_enable": ours(
        Use("differs", "on by default where no --train.micro_batch_size is given; packing is --ds.packing_samples"),
        GPU,
    ),
    "train.ema_beta": ours(Use("works"), GPU, **SHARE),
    "train.enable_ema": ours(
        Use("differs", f"in float32, saved beside the policy, in the folder {EMA_FOLDER} of --ckpt.output_dir"),
        Use("gpu", "saved in place of the policy"),
    ),
    "train.full_determinism_enable": works(),
    "train.max_epochs": works(**COUNT),
    "train.max_tokens_per_gpu": ours(
        Use(
            "differs",
            f"counts padding where samples are padded; without CUDA the default is {CPU_TOKENS}; a longer sample goes "
            "alone",
        ),
        GPU,
        **COUNT,
    ),
    "train.micro_batch_size": ours(
        Use("differs", "where it is not given, micro-batches have --train.max_tokens_per_gpu tokens"), **COUNT
    ),
    "train.num_episodes": works(**COUNT),
    "train.partial_rollout_enable": nowhere(
        "the engine is a synchronous vllm.LLM, which samples a batch to its end and cannot be paused for new weights"
    ),
    "train.seed": works(within="[0, 4294967295]"),
    "use_ms": works(package="modelscope"),
    "vllm.enable_prefix_caching": works(),
    "vllm.enable_sleep": gpu(),
    "vllm.enforce_eager": differs("without CUDA the default is on"),
    "vllm.gpu_memory_utilization": gpu("without one the KV cache has 512 MiB", within="(0, 1]"),
    "vllm.num_engines": differs("the default is 1; vLLM cannot be switched off", **COUNT),
    "vllm.sync_backend": gpu("Ray's gloo cannot join processes that have a process group", choices=("nccl",)),
    "vllm.sync_with_ray": gpu("OpenRLHF's path, on Ray's NCCL group", package="cupy"),
    "vllm.tensor_parallel_size": gpu(**COUNT),
}


def openrlhf_flag(name: str) -> Flag | None:
    """The entry of one of OpenRLHF's flags, by its name without dashes; None for one that is not OpenRLHF's."""
    return FLAGS.get(name) or next(
        (flag for pattern, flag in FLAGS.items() if pattern.endswith("*") and name.startswith(pattern[:-1])), None
    )


def kind_of(loss: str) -> str:
    return OPENRLHF if loss == OPENRLHF else "group" if loss in GROUP_LOSSES else "token"
