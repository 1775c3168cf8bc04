"""A flag without what it needs, beside what it excludes, or with a value that would end the run later, is refused."""

import importlib.util
from pathlib import Path

import pytest
from command_lines import BASE, EVALUATED, refused

from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve

OPENRLHF_SEQ = "--loss openrlhf --algo.advantage.is_correction_level seq"
CORRECTED = "--runtime ray --algo.advantage.is_correction_level seq"
ASYNC = "--train.async_enable"
ROLLOUTS = "with --apo.load_rollouts, which neither samples nor scores"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--eval.temperature 0.5", "--eval.temperature has no effect without --eval.dataset"),
        ("--eval.steps 3", "--eval.steps has no effect without --eval.dataset"),
        ("--eval.ends", "--eval.ends has no effect without --eval.dataset"),
        ("--eval.dataset e", "--eval.dataset has no effect without --eval.steps or --eval.ends"),
        ("--ckpt.best_metric_key none", "--ckpt.best_metric_key has no effect without an evaluation"),
        ("--ckpt.disable_ds", "--ckpt.disable_ds has no effect without --ckpt.save_hf"),
        ("--ckpt.disable_ds --ckpt.save_steps 2", "no checkpoint of any kind is left then: add --ckpt.save_hf"),
        (f"--ckpt.max_num 2 {EVALUATED}", "--ckpt.max_num has no effect without --ckpt.save_steps"),
        (
            "--ckpt.max_mem 2 --ckpt.save_steps 1 --ckpt.disable_ds --ckpt.save_hf",
            "--ckpt.max_mem has no effect with --ckpt.disable_ds",
        ),
        ("--ds.use_universal_ckpt", "without --ckpt.load_enable"),
        ("--ckpt.allow_changed loss", "without --ckpt.load_enable"),
        ("--reward.isolate", "--reward.isolate has no effect where the reward is no .py file"),
        ("--logger.wandb.project p --logger.tensorboard_dir t", "without --logger.wandb.key"),
        ("--logger.wandb.run_name r", "without a tracker (--logger.wandb.key, --logger.tensorboard_dir, --logger."),
        ("--logger.logging_steps 2", "without a tracker (--logger.wandb.key, --logger.tensorboard_dir, --logger."),
        ("--actor.muon.lr 0.1", "with --actor.optim adam: drop it, or use --actor.optim muon"),
        ("--actor.min_lr_ratio 0.2 --actor.lr_scheduler cosine", "with other --actor.lr_scheduler than"),
        ("--actor.lr_warmup_ratio 0.2 --actor.lr_scheduler constant", "with --actor.lr_scheduler constant"),
        ("--actor.gradient_checkpointing_reentrant", "without --actor.gradient_checkpointing_enable"),
        ("--ds.zpg 2", "below --ds.zero_stage 3"),
        ("--ds.overlap_comm --ds.zero_stage 0", "with --ds.zero_stage 0"),
        ("--data.input_template Q{} --data.apply_chat_template", "with --data.apply_chat_template"),
        ("--data.prompt_probs 1", "with one --data.prompt_dataset"),
        ("--algo.kl.target 6 --loss openrlhf --algo.kl.init_coef 0", "--algo.kl.target has no effect without KL"),
        ("--ref.num_nodes 1 --loss openrlhf --algo.kl.init_coef 0", "--ref.num_nodes has no effect without KL"),
        ("--algo.kl.use_loss --loss grpo --adrpo.enable", "--algo.kl.use_loss has no effect with --adrpo.enable"),
        ("--algo.kl.horizon 5 --loss openrlhf", "without --algo.kl.target"),
        ("--algo.kl.horizon 5 --loss grpo", "without --algo.kl.target"),
        ("--algo.kl.target 6 --loss apo", "--algo.kl.target has no effect without KL"),
        ("--algo.kl.target 6 --adrpo.enable", "--algo.kl.target has no effect with --adrpo.enable"),
        ("--loss grpo --algo.kl.no_use_loss --algo.kl.unbiased_gradient", "without --algo.kl.use_loss"),
        ("--algo.kl.unbiased_gradient --loss openrlhf", "without --algo.kl.use_loss"),
        ("--train.colocate_actor_ref --train.colocate_all --loss openrlhf", "with --train.colocate_all"),
        ("--loss grpo --actor.eps_clip 0.1 --actor.eps_clip_low_high 0.1 0.1", "with --actor.eps_clip_low_high"),
        ("--actor.loss_agg_mode token-mean --actor.policy_loss_type gspo --loss openrlhf", "gspo"),
        ("--algo.advantage.is_correction_mode clip --loss openrlhf", "without --algo.advantage.is_correction_level"),
        (f"{OPENRLHF_SEQ} --algo.advantage.is_correction_mode mask --actor.policy_loss_type gspo", "gspo"),
        (f"{CORRECTED} --loss gspo --algo.advantage.is_correction_mode mask", "has no effect with gspo"),
        (CORRECTED.replace("ray", "auto"), "has no effect with --runtime embedded"),
        ("--algo.advantage.gamma 0.9 --loss openrlhf", "than reinforce"),
        ("--algo.advantage.no_std_norm --loss openrlhf", "than reinforce and reinforce_baseline"),
        ("--apo.old_log_probs engine", "--apo.old_log_probs has no effect without --train.async_enable"),
        (f"{ASYNC} --apo.old_log_probs weights --apo.anchor ema", "has no effect with --apo.anchor lagged, ema and"),
        (f"{ASYNC} --apo.old_log_probs engine --apo.max_mismatch 2", "as there is nothing to compare them with"),
        (f"{ASYNC} --apo.anchor lagged {CORRECTED}", "as there is nothing to compare them with"),
        ("--apo.load_rollouts ROLLOUTS --vllm.num_engines 1", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --apo.check_weights", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --rollout.top_p 0.9", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --rollout.vllm_generate_batch_size 4096", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --data.max_len 64", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --train.num_episodes 2", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --reward.timeout 2", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --reward.model_name_or_path r", ROLLOUTS),
        ("--apo.load_rollouts ROLLOUTS --reward.weights 1 2", ROLLOUTS),
        (
            "--apo.load_rollouts ROLLOUTS --rollout.max_new_tokens 9",
            "where neither the loss nor a length penalty asks",
        ),
        ("--apo.load_rollouts ROLLOUTS --apo.save_rollouts x", "--apo.save_rollouts has no effect"),
    ],
)
def test_a_flag_without_what_it_needs_is_refused(argv, message, tmp_path):
    (tmp_path / "rollout_00001.jsonl").touch()
    argv = argv.replace("ROLLOUTS", str(tmp_path)).split()
    if "--apo.load_rollouts" in argv:
        with pytest.raises(OptionError, match="no effect") as error:
            resolve([*BASE[:2], *argv], check_model_folder=False)
        assert message in str(error.value)
    else:
        assert message in refused(*argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--loss openrlhf --train.ema_beta 0.9", "--train.ema_beta has no effect without --train.enable_ema"),
        ("--loss openrlhf --train.max_tokens_per_gpu 99", "without --train.dynamic_batch_enable"),
        (
            "--loss openrlhf --rollout.micro_batch_size 2 --train.dynamic_batch_enable",
            "with --train.dynamic_batch_enable",
        ),
        (
            "--loss openrlhf --train.micro_batch_size 2 --train.dynamic_batch_enable",
            "with --train.dynamic_batch_enable",
        ),
        (
            "--train.micro_batch_size 2 --train.max_tokens_per_gpu 99",
            "beside --train.micro_batch_size: drop one",
        ),
        (
            "--train.micro_batch_size 2 --train.dynamic_batch_enable",
            "beside --train.micro_batch_size: drop one",
        ),
        ("--loss openrlhf --ref.offload", "--ref.offload has no effect below --ds.zero_stage 3"),
        ("--reward.model_name_or_path r --reward.offload", "--reward.offload has no effect below --ds.zero_stage 3"),
        (
            "--reward.model_name_or_path r --train.colocate_all --reward.num_gpus_per_node 4 --vllm.num_engines 8",
            "--reward.num_gpus_per_node must be the actor's with --train.colocate_all",
        ),
        ("--ds.ring_attn_head_stride 2", "with --ds.ring_attn_size 1"),
        (f"{ASYNC} --train.colocate_all", "--train.colocate_all cannot be used with --train.async_enable"),
        (f"{ASYNC} --train.colocate_all --vllm.enable_sleep", "cannot be used with --train.async_enable: drop one"),
        ("--vllm.sync_with_ray --train.colocate_all", "where weights travel by CUDA IPC"),
        # OpenRLHF would change them without an error.
        ("--vllm.enable_sleep", "--vllm.enable_sleep True would become False"),
        (
            "--ds.packing_samples --ds.attn_implementation sdpa",
            "--ds.attn_implementation sdpa would become flash_attention_2",
        ),
        # What would end the run later.
        ("--train.colocate_all --actor.num_gpus_per_node 2", "is 1, and must be 2"),
        (
            "--loss openrlhf --train.colocate_actor_ref --ref.num_gpus_per_node 4",
            "--ref.num_gpus_per_node must be the actor's",
        ),
        ("--ds.ring_attn_size 3", "not made of groups"),
        ("--actor.optim muon --ds.adam_offload", "--ds.adam_offload cannot be used with --actor.optim muon"),
        ("--ds.tensor_parallel_size 2 --ds.param_dtype fp16", "needs --ds.param_dtype bf16"),
        ("--loss openrlhf --train.micro_batch_size 3", "--train.micro_batch_size 3 x 8 ranks"),
        ("--loss openrlhf --train.micro_batch_size 64 --ds.tensor_parallel_size 2", "64 x 4 ranks"),
    ],
)
def test_refused_with_a_gpu(argv, message, packages):
    assert message in refused(*argv.split(), device="cuda")


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--data.input_template Question", "--data.input_template Question would become None"),
        ("--ds.zero_stage 4", "--ds.zero_stage must be a number in [0, 3], got 4"),
        ("--ckpt.save_steps 0", "--ckpt.save_steps must be a number in [1, inf), got 0 (or -1, for never)"),
        ("--eval.dataset e --eval.steps 0", "--eval.steps must be a number in [1, inf), got 0"),
        ("--eval.dataset e --eval.ends --eval.temperature -1", "--eval.temperature must be a number in [0, inf)"),
        (f"{EVALUATED} --eval.temperature 0 --eval.n_samples_per_prompt 4", "at --eval.temperature 0 all answers are"),
        ("--rollout.max_new_tokens 0", "--rollout.max_new_tokens must be a number in [1, inf), got 0"),
        ("--rollout.top_p 0", "--rollout.top_p must be a number in (0, 1], got 0"),
        ("--reward.stop_properly_penalty_coef 1.5", "must be a number in (-inf, 1], got 1.5"),
        ("--algo.kl.init_coef -0.1", "--algo.kl.init_coef must be a number in [0, inf), got -0.1"),
        ("--loss grpo --actor.dual_clip 1", "--actor.dual_clip must be a number in (1, inf), got 1.0"),
        ("--loss openrlhf --actor.dual_clip 0.5", "--actor.dual_clip must be a number in (1, inf), got 0.5"),
        ("--actor.adam.betas 0.9 1", "--actor.adam.betas must be a number in [0, 1), got 1.0"),
        ("--vllm.num_engines 0", "--vllm.num_engines must be a number in [1, inf), got 0"),
        ("--actor.lr_scheduler cosin", "--actor.lr_scheduler must be one of linear, cosine, "),
        ("--ds.grad_accum_dtype float64", "--ds.grad_accum_dtype must be one of fp32, bf16, fp16"),
        ("--ds.grad_accum_dtype bf16 --ds.zero_stage 0", "needs ZeRO"),
        ("--ds.grad_accum_dtype bf16 --ds.zero_stage 1", "a step without gradient would stop the run"),
        ("--ds.grad_accum_dtype bf16 --ds.zero_stage 2", "the weights' own dtype"),
        ("--actor.optim muon --ds.zero_stage 0", "is plain SGD without ZeRO"),
        ("--actor.optim muon --ds.zero_stage 3", "raises beside its reduce-scatter"),
        ("--ds.overlap_comm --ds.zero_stage 1", "--ds.overlap_comm needs --ds.zero_stage 2 or 3"),
        ("--ds.attn_implementation flash_attention_3", "flash_attention_3 needs a GPU: use sdpa"),
        ("--ds.param_dtype fp16", "fp16 needs a GPU"),
        ("--apo.sync openrlhf", "--apo.sync openrlhf needs a GPU: drop it"),
        ("--data.prompt_dataset a,b --data.prompt_probs 1", "are 1 for 2 data sets"),
        (f"--ckpt.best_metric_key eval_default_pass1 {EVALUATED}", "use eval/pass1"),
        (f"--ckpt.best_metric_key eval/pas1 {EVALUATED}", "one of pass1, score_mean, pass4, score_best4, distinct"),
        (f"--ckpt.best_metric_key eval/pass4 --eval.n_samples_per_prompt 1 {EVALUATED}", "one of pass1, score_mean)"),
        ("--alpha_mode ess --apo.gamma 0.1", "--apo.gamma 0.1 must be above 1/8"),
        (f"{OPENRLHF_SEQ} --algo.advantage.is_correction_mode clip", "_mode clip needs"),
        (f"{OPENRLHF_SEQ} --algo.advantage.is_correction_gating tv", "is bounded from above only"),
        ("--algo.kl.init_coef 0.1 --algo.kl.target 6 --algo.kl.horizon 1000", "give more than 1638.4"),
        (f"{CORRECTED} --loss grpo --algo.advantage.is_correction_gating tv", "is bounded from above only"),
        (f"{CORRECTED} --loss grpo --algo.advantage.is_correction_mode clip", "_mode clip needs"),
        (CORRECTED.replace("seq", "token"), "a function of log-ratios of whole answers"),
        (f"{CORRECTED} --algo.advantage.is_correction_threshold 2 1", "give HIGH above 0, or LOW below HIGH"),
        ("--loss openrlhf --rollout.n_samples_per_prompt 1", "but for --algo.advantage.estimator reinforce and flash"),
        ("--reward.max_failures -1", "must not be negative"),
        ("--rollout.batch_size 64 --rollout.vllm_generate_batch_size 32", "every rollout would be short"),
        ("--algo.dynamic_filtering_enable --algo.dynamic_filtering_range 1 0", "the second must be above the first"),
        ("--rollout.batch_size 16 --actor.num_gpus_per_node 200", "are not one for each of 200 ranks"),
        (f"{ASYNC} --runtime ray --rollout.max_engine_restarts 1", "use --train.max_restarts (a new engine"),
        (f"{ASYNC} --loss gtpo --apo.old_log_probs engine", "cannot be used with --loss gtpo"),
        ("--use_ms", "--use_ms needs the package modelscope: pip install 'modelscope'"),
    ],
)
def test_what_would_end_the_run_later_is_refused(argv, message):
    assert message in refused(*argv.split())


@pytest.mark.parametrize(
    "package, file, text",
    [
        ("deepspeed", "runtime/engine.py", "managed_gradient_accumulation=False supports ZeRO overlap_comm only with"),
        ("deepspeed", "runtime/engine.py", "managed_gradient_accumulation=False is not supported with DeepCompile"),
        ("deepspeed", "runtime/engine.py", 'f"unsupported mix of {model_dtype=} and {grad_accum_dtype=}"'),
        ("deepspeed", "runtime/zero/stage3.py", "if self.use_muon and self.reduce_scatter:"),
        ("deepspeed", "runtime/zero/stage_1_and_2.py", "Muon with reduce scatter does not support optimizer offload"),
        ("openrlhf", "utils/deepspeed/deepspeed.py", "set `max_norm=0` to disable global clipping"),
        (
            "deepspeed",
            "runtime/zero/muon/muon_optimizer.py",
            "we move the muon update part to the deepspeed's optimizer",
        ),
        ("openrlhf", "utils/deepspeed/deepspeed_utils.py", 'zero_opt_dict["reduce_scatter"] = True'),
        ("openrlhf", "utils/deepspeed/deepspeed_utils.py", '"stage": stage,'),
        ("openrlhf", "utils/deepspeed/deepspeed.py", "stage=self.stage if self.stage == 3 else 0,"),
        (
            "openrlhf",
            "trainer/ray/ppo_actor.py",
            'self.use_cuda_ipc = backend == "nccl" and self.args.train.colocate_all',
        ),
        (
            "openrlhf",
            "trainer/ray/ppo_actor.py",
            'self.strategy.moving_average(self.actor, self.ema_model, self.ema_beta, "cuda")',
        ),
        ("openrlhf", "trainer/ppo_utils/experience_maker.py", 'self.advantage_estimator != "reinforce":'),
        ("openrlhf", "models/loss.py", 'self.is_correction_level != "off" and self.policy_loss_type == "ppo"'),
        (
            "openrlhf",
            "models/ring_attn_utils.py",
            "ring_flash_attn<=0.1.8 imports is_flash_attn_greater_or_equal_2_10",
        ),
        ("ray", "util/collective/collective_group/torch_gloo_collective_group.py", "if not dist.is_initialized():"),
        ("ray", "util/collective/collective_group/nccl_util.py", "NCCL in Ray requires Cupy being available!"),
    ],
)
def test_upstream_has_the_lines_that_refusals_rest_on(package, file, text):
    root = Path(importlib.util.find_spec(package).origin).parent
    assert text in (root / file).read_text(encoding="utf-8")


def test_files_of_an_earlier_run_are_no_saved_rollouts(tmp_path):
    (tmp_path / "rollout_00001.jsonl.1").touch()
    with pytest.raises(OptionError, match="no rollout_\\*.jsonl there"):
        resolve([*BASE[:2], "--apo.load_rollouts", str(tmp_path)], check_model_folder=False)
