"""Every flag of OpenRLHF's is in one class (options/openrlhf_flags.py), and the checks do what the class says."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options import effects, resolve
from openrlhf_apo.options.conditions import CONDITIONS
from openrlhf_apo.options.openrlhf_flags import FLAGS, SCHEDULERS, SCHEDULERS_WITH_MIN_LR, openrlhf_flag
from openrlhf_apo.options.owners import value_of
from openrlhf_apo.options.resolve import make_parser
from openrlhf_apo.options.upstream import upstream_parser

ROOT = Path(__file__).parents[1]
BASE = "--actor.model_name_or_path m --data.prompt_dataset d.jsonl --reward.remote_url http://localhost:1".split()
LOSSES = {"group": "apo", "token": "grpo", "openrlhf": "openrlhf"}
UPSTREAM = {
    action.option_strings[0].removeprefix("--"): action
    for action in upstream_parser()._actions
    if action.dest != "help"
}

# A value that is not the default, where "2", "0.5", "x" or the last choice is none.
VALUES = {
    "actor.dual_clip": "3",
    "algo.advantage.is_correction_gating": "tv",
    "algo.advantage.is_correction_threshold": "0.1",
    "algo.advantage.estimator": "rloo",
    "algo.dynamic_filtering_range": "0.1 0.9",
    "algo.kl.estimator": "k2",
    "algo.kl.horizon": "20000",
    "actor.lr_scheduler": "linear",
    "ckpt.best_metric_key": "eval/pass4",
    "data.input_template": "Q: {}",
    "data.prompt_probs": "0.5,0.5",
    "ds.attn_implementation": "eager",
    "ds.grad_accum_dtype": "bf16",
    "ds.param_dtype": "bf16",
    "ds.zero_stage": "3",
    "local_rank": "0",
    "reward.remote_url": "http://localhost:2",
    "rollout.batch_size": "512",
    "rollout.n_samples_per_prompt": "4",
    "rollout.vllm_generate_batch_size": "2048",
    "train.agent_func_path": str(ROOT / "examples" / "agents" / "calculator.py"),
    "train.batch_size": "64",
    "vllm.sync_backend": "nccl",
}
EVALUATED = "--eval.dataset e.jsonl --eval.steps 2"
# What the flag needs beside it, for no check but its own to speak.
BESIDE = {
    "ds.grad_accum_dtype": "--ds.zero_stage 3",
    "actor.gradient_checkpointing_reentrant": "--actor.gradient_checkpointing_enable",
    "actor.muon.lr": "--actor.optim muon",
    "actor.muon.momentum": "--actor.optim muon",
    "algo.advantage.gamma": "--algo.advantage.estimator reinforce",
    "algo.advantage.is_correction_gating": "--algo.advantage.is_correction_level seq "
    "--algo.advantage.is_correction_threshold 0.1 --runtime ray",
    "algo.advantage.is_correction_level": "--runtime ray",
    "algo.advantage.is_correction_mode": "--algo.advantage.is_correction_level token --runtime ray",
    "algo.advantage.is_correction_threshold": "--algo.advantage.is_correction_level seq --runtime ray",
    "algo.advantage.no_std_norm": "--algo.advantage.estimator reinforce",
    "algo.dynamic_filtering_range": "--algo.dynamic_filtering_enable",
    "algo.kl.estimator": "--algo.kl.init_coef 0.1",
    "algo.kl.horizon": "--algo.kl.target 6 --algo.kl.init_coef 0.1",
    "algo.kl.target": "--algo.kl.init_coef 0.1",
    "algo.kl.unbiased_gradient": "--algo.kl.use_loss --algo.kl.init_coef 0.1",
    "algo.kl.use_loss": "--algo.kl.init_coef 0.1",
    "ckpt.best_metric_key": EVALUATED,
    "ckpt.disable_ds": "--ckpt.save_steps 2",
    "ckpt.max_mem": "--ckpt.save_steps 2",
    "ckpt.max_num": "--ckpt.save_steps 2",
    "ckpt.save_hf": EVALUATED,
    "data.prompt_probs": "--data.prompt_dataset a.jsonl,b.jsonl",
    "ds.load_in_4bit": "--ds.lora.rank 2 --ds.param_dtype bf16",
    "ds.lora.alpha": "--ds.lora.rank 2",
    "ds.lora.dropout": "--ds.lora.rank 2",
    "ds.lora.target_modules": "--ds.lora.rank 2",
    "ds.ring_attn_head_stride": "--ds.ring_attn_size 2",
    "ds.use_universal_ckpt": "--ckpt.load_enable",
    "ds.value_head_prefix": "--reward.model_name_or_path r",
    "ds.zpg": "--ds.zero_stage 3",
    "eval.dataset": "--eval.steps 2",
    "eval.n_samples_per_prompt": EVALUATED,
    "eval.split": EVALUATED,
    "eval.steps": "--eval.dataset e.jsonl",
    "eval.temperature": EVALUATED,
    "logger.logging_steps": "--logger.tensorboard_dir t",
    "logger.wandb.group": "--logger.wandb.key k",
    "logger.wandb.org": "--logger.wandb.key k",
    "logger.wandb.project": "--logger.wandb.key k",
    "logger.wandb.run_name": "--logger.tensorboard_dir t",
    "ref.offload": "--ds.zero_stage 3 --algo.kl.init_coef 0.1",
    "reward.normalize_enable": "--reward.model_name_or_path r",
    "reward.num_gpus_per_node": "--reward.model_name_or_path r",
    "reward.num_nodes": "--reward.model_name_or_path r",
    "reward.offload": "--reward.model_name_or_path r --ds.zero_stage 3",
    "reward.overlong_buffer_len": "--rollout.max_new_tokens 9",
    "reward.overlong_penalty_factor": "--rollout.max_new_tokens 9 --reward.overlong_buffer_len 3",
    "rollout.max_tokens_per_gpu": "--train.dynamic_batch_enable",
    "train.ema_beta": "--train.enable_ema",
    "train.max_tokens_per_gpu": "--train.dynamic_batch_enable",
    "vllm.enable_sleep": "--train.colocate_all --actor.num_gpus_per_node 1",
}


def words(flag: str) -> list[str]:
    """The flag with a value that is not its default, as on the command line."""
    action = UPSTREAM[flag]
    if action.nargs == 0:
        return [f"--{flag}"]
    generic = {int: "2", float: "0.5", str: "x"}[action.type]
    value = VALUES.get(flag) or (list(action.choices)[-1] if action.choices else generic)
    if action.nargs == 2 and " " not in value:
        value = f"{value} {value}"
    return [f"--{flag}", *(value.split() if action.nargs == 2 else [value])]


@pytest.fixture
def packages(monkeypatch):
    """Every optional package is installed."""
    monkeypatch.setattr(effects, "find_spec", lambda name: True)
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    monkeypatch.setattr(effects, "version", lambda name: "9.9.9")
    hub = types.ModuleType("modelscope.utils.hf_util")
    hub.patch_hub = lambda: None
    for name, module in {"modelscope": hub, "modelscope.utils": hub, hub.__name__: hub}.items():
        monkeypatch.setitem(sys.modules, name, module)


def settings(*argv: str, device: str = "cpu"):
    base = BASE[:4] if "--train.agent_func_path" in argv else BASE  # an agent brings its reward along
    return resolve([*base, "--apo.device", device, *argv], check_model_folder=False)


def refused(*argv: str, device: str = "cpu") -> str:
    with pytest.raises(OptionError) as error:
        settings(*argv, device=device)
    message = str(error.value)
    assert "\n" not in message and message.startswith("-")
    return message


def test_every_flag_of_openrlhf_is_in_one_class_and_no_class_is_empty():
    assert len(UPSTREAM) == 167
    assert [flag for flag in UPSTREAM if openrlhf_flag(flag) is None] == []
    for pattern in FLAGS:
        matched = [
            flag for flag in UPSTREAM if flag == pattern or (pattern[-1] == "*" and flag.startswith(pattern[:-1]))
        ]
        assert matched, pattern
        assert pattern[-1] != "*" or not FLAGS.keys() & set(matched), f"{pattern} and one of {matched}"


def test_never_to_evaluate_can_be_said_without_a_dataset():
    assert settings("--eval.steps", "-1").eval.steps == -1


def test_conditions_and_cases_name_flags_that_are_there():
    known = {action.dest for action in make_parser()._actions}
    for condition in CONDITIONS:
        for name in condition.flags.split(" "):
            assert name in known or (name[-1] == "*" and any(flag.startswith(name[:-1]) for flag in known)), name
    assert (VALUES.keys() | BESIDE.keys()) - UPSTREAM.keys() == set()


@pytest.mark.parametrize("flag", UPSTREAM)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_flag_does_what_its_class_says(flag, kind, packages):
    use = openrlhf_flag(flag).use(kind)
    argv = ["--loss", LOSSES[kind], *BESIDE.get(flag, "").split(), *words(flag)]
    if use.kind == "refused":
        for device in ("cpu", "cuda"):
            argv = ["--loss", LOSSES[kind], *words(flag)]  # refused before what is beside it matters
            message = refused(*argv, device=device)
            assert message.startswith(f"--{UPSTREAM[flag].dest} ") and use.text in message
        return
    if use.kind == "owner":
        return  # test_clip_flags_work_with_the_losses_that_take_them_over
    if use.kind == "gpu":
        assert "needs a GPU: drop it" in refused(*argv, device="cpu")
    args = settings(*argv, device="cuda" if use.kind == "gpu" else "cpu")
    dest = UPSTREAM[flag].dest
    parsed = vars(upstream_parser().parse_args(words(flag)))[dest] if flag != "ds.param_dtype" else "bf16"
    found = value_of(args, dest)
    assert dest in args.given
    if dest in ("ckpt.path", "ckpt.output_dir"):
        parsed = os.path.abspath(parsed)
    assert found == parsed or found == [parsed] or found == [0.0, *parsed]


@pytest.mark.parametrize("loss", [*GROUP_LOSSES, *TOKEN_LOSSES])
def test_clip_flags_work_with_the_losses_that_take_them_over(loss):
    own = {each.flag for each in (GROUP_LOSSES | TOKEN_LOSSES)[loss].settings}
    common = ["--loss", loss, "--rollout.max_new_tokens", "9"]
    for flag in ("actor.eps_clip", "actor.eps_clip_low_high", "actor.dual_clip"):
        if flag.replace("eps_clip_low_high", "eps_clip").replace("eps_clip", "eps_clip_low_high") in own:
            settings(*common, *words(flag))
        else:
            assert f"--{flag} has no effect with --loss {loss}" in refused(*common, *words(flag))


def test_the_page_is_what_parser_and_tables_say():
    """In a process of its own, whose registries hold no loss of another test."""
    code = "from openrlhf_apo.options.flag_docs import page; import sys; sys.stdout.write(page())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "openrlhf_flags.md").read_text(encoding="utf-8")
    assert result.stdout == page, "stale: python -m openrlhf_apo.options.flag_docs"
    for action in make_parser()._actions:
        if action.dest != "help":
            assert f"| `{action.option_strings[0]}` |" in page


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
        ("--ckpt.save_hf", "--ckpt.save_hf has no effect where no checkpoint is written"),
        (f"--ckpt.save_hf {EVALUATED} --ckpt.best_metric_key none", "where no checkpoint is written"),
        ("--ckpt.disable_ds", "where no checkpoint is written"),
        (f"--ckpt.max_num 2 {EVALUATED}", "--ckpt.max_num has no effect without --ckpt.save_steps"),
        (
            "--ckpt.max_mem 2 --ckpt.save_steps 1 --ckpt.disable_ds",
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


def test_packages_are_looked_for(monkeypatch):
    ring = ["--ds.ring_attn_size", "2"]
    monkeypatch.setattr(effects, "find_spec", lambda name: None)
    assert "needs the package ring_flash_attn" in refused(*ring, device="cuda")
    assert "needs the package wandb: pip install 'wandb'" in refused("--logger.wandb.key", "k")
    assert "needs the package tensorboard: pip install 'tensorboard'" in refused("--logger.tensorboard_dir", "t")
    monkeypatch.setattr(effects, "find_spec", lambda name: True)
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    monkeypatch.setattr(effects, "version", lambda name: "0.1.7")
    assert "needs ring_flash_attn>=0.1.8, here is 0.1.7" in refused(*ring, device="cuda")
    monkeypatch.setattr(effects, "version", lambda name: "0.1.8")
    assert settings(*ring, device="cuda").ds.packing_samples


def test_flags_of_experts_need_a_model_with_experts(tmp_path):
    from transformers import Qwen3Config, Qwen3MoeConfig

    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    Qwen3Config(**shape).save_pretrained(tmp_path / "dense")
    Qwen3MoeConfig(**shape).save_pretrained(tmp_path / "experts")
    for argv in (["--ds.experts_implementation", "eager"], ["--loss", "openrlhf", "--actor.aux_loss_coef", "0.1"]):
        resolve([*BASE, *argv, BASE[0], str(tmp_path / "experts")])
        with pytest.raises(OptionError, match="has no effect: .* has no "):
            resolve([*BASE, *argv, BASE[0], str(tmp_path / "dense")])
    ray = [*BASE, "--runtime", "ray", BASE[0], str(tmp_path / "experts")]
    assert (resolve(ray).apo.sync, resolve([*ray[:-1], str(tmp_path / "dense")]).apo.sync) == ("buckets", None)


def test_what_openrlhf_changes_by_default_is_logged(caplog, tmp_path, packages):
    dynamic = ["--loss", "openrlhf", "--train.dynamic_batch_enable"]
    with caplog.at_level("INFO"):
        assert settings(*dynamic, device="cuda").ds.packing_samples
    assert "--ds.packing_samples is True, not False, with these flags" in caplog.text
    path = tmp_path / "run.yaml"
    path.write_text("ds.packing_samples: false\n")
    message = refused(*dynamic, "--config", str(path), device="cuda")
    assert "--ds.packing_samples False would become True" in message


def test_saved_rollouts_go_with_packing(tmp_path, packages):
    (tmp_path / "rollout_00001.jsonl").touch()
    argv = [*BASE[:2], "--apo.device", "cuda", "--apo.load_rollouts", str(tmp_path), "--ds.packing_samples"]
    args = resolve([*argv, "--train.colocate_all"], check_model_folder=False)
    assert args.ds.packing_samples and args.vllm.num_engines == 0


def test_single_samples_for_estimators_without_groups():
    for estimator in ("reinforce", "flash_reinforce"):
        argv = ["--loss", "openrlhf", "--algo.advantage.estimator", estimator, "--rollout.n_samples_per_prompt", "1"]
        assert settings(*argv).rollout.n_samples_per_prompt == 1
    assert "at least 2 samples" in refused("--loss", "openrlhf", "--rollout.n_samples_per_prompt", "1")


def test_kl_in_the_reward_of_a_token_loss(tmp_path):
    kl = settings("--loss", "grpo").algo.kl
    assert (kl.use_loss, kl.estimator, kl.init_coef) == (True, "k3", 0.04)
    kl = settings("--loss", "grpo", "--algo.kl.no_use_loss").algo.kl
    assert (kl.use_loss, kl.estimator, kl.init_coef) == (False, "k1", 0.04)
    path = tmp_path / "run.yaml"
    for content, use_loss in (("algo.kl.use_loss: false", False), ("algo.kl.no_use_loss: false", True)):
        path.write_text(content)
        kl = settings("--loss", "grpo", "--config", str(path)).algo.kl
        assert (kl.use_loss, kl.estimator) == (use_loss, "k3" if use_loss else "k1")
    assert "KL in the loss only" in refused("--algo.kl.no_use_loss", "--algo.kl.init_coef", "0.1")


def test_schedulers_that_are_let_through_make_steps_and_no_other_would():
    """As OpenRLHF calls transformers (utils/deepspeed/deepspeed.py): with the numbers of steps and a least rate."""
    import torch
    from transformers.trainer import get_scheduler
    from transformers.trainer_utils import SchedulerType

    def run(name: str) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        least = {"min_lr_rate": 0.1} if name in SCHEDULERS_WITH_MIN_LR else {}
        scheduler = get_scheduler(name, optimizer, 1, 3, scheduler_specific_kwargs=least)
        for _ in range(4):
            optimizer.step()
            scheduler.step()

    for name in SCHEDULERS:
        run(name)
    for name in {each.value for each in SchedulerType} - set(SCHEDULERS):
        with pytest.raises((TypeError, ValueError)):
            run(name)


def test_flash_attention_is_the_default_where_it_is_installed_and_refused_where_not(monkeypatch):
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    assert settings(device="cuda").ds.attn_implementation == "flash_attention_2"
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: False)
    assert settings(device="cuda").ds.attn_implementation == "sdpa"
    assert "needs the package flash-attn" in refused("--ds.packing_samples", device="cuda")


def test_flags_of_the_cluster_choose_it_and_are_refused_without(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert settings().runtime == "embedded"
    assert settings("--ds.zero_stage", "3").runtime == settings("--runtime", "ray").runtime == "ray"
    assert settings("--loss", "openrlhf").runtime == settings("--ds.param_dtype", "bf16").runtime == "ray"
    assert settings(device="cuda").runtime == "ray"
    assert settings("--runtime", "embedded", device="cuda").runtime == "embedded"
    message = refused("--runtime", "embedded", "--vllm.num_engines", "2")
    assert message == "--vllm.num_engines has no effect with --runtime embedded: drop it, or use --runtime ray"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert settings().runtime == "ray"
