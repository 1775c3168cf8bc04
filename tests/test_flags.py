"""Every flag of OpenRLHF's is in one class (options/openrlhf_flags.py), and the checks do what the class says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import BASE, EVALUATED, refused, settings

from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options import effects, resolve
from openrlhf_apo.options.conditions import CONDITIONS
from openrlhf_apo.options.openrlhf_flags import FLAGS, SCHEDULERS, SCHEDULERS_WITH_MIN_LR, openrlhf_flag
from openrlhf_apo.options.owners import value_of
from openrlhf_apo.options.resolve import make_parser
from openrlhf_apo.options.upstream import upstream_parser

ROOT = Path(__file__).parents[1]
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
    "ckpt.disable_ds": "--ckpt.save_hf",
    "ckpt.max_mem": "--ckpt.save_steps 2",
    "ckpt.max_num": "--ckpt.save_steps 2",
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


def test_a_greedy_evaluation_takes_one_answer():
    greedy = settings("--eval.dataset", "e.jsonl", "--eval.ends", "--eval.temperature", "0")
    assert (greedy.eval.n_samples_per_prompt, settings().eval.n_samples_per_prompt) == (1, 4)


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


def test_flags_of_experts_need_a_model_with_experts(tmp_path, monkeypatch):
    from transformers import Qwen3Config, Qwen3MoeConfig

    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").touch()
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    Qwen3Config(**shape).save_pretrained(tmp_path / "dense")
    Qwen3MoeConfig(**shape).save_pretrained(tmp_path / "experts")
    for argv in (["--ds.experts_implementation", "eager"], ["--loss", "openrlhf", "--actor.aux_loss_coef", "0.1"]):
        resolve([*BASE, *argv, BASE[0], str(tmp_path / "experts")])
        with pytest.raises(OptionError, match="has no effect: .* has no "):
            resolve([*BASE, *argv, BASE[0], str(tmp_path / "dense")])
    nccl = ["--apo.device", "cuda", "--vllm.sync_backend", "nccl", BASE[0], str(tmp_path / "experts")]
    with pytest.raises(OptionError, match="has experts, whose weights go in buckets"):
        resolve([*BASE, *nccl])
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
