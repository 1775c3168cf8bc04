"""OpenRLHF's example commands, flag by flag: what is taken over, what is left out and why (docs/openrlhf_modes.md)."""

import math
import shlex

import pytest
from real_runs import DIGITS_REWARD
from test_agents import AGENT
from test_embedded import run
from tiny_models import save_reward_model

from openrlhf_apo import cpu
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve
from openrlhf_apo.options.runtime import needs_ray

# examples/scripts of OpenRLHF, commit 3c3be62, without paths; its --algo.advantage.is_correction_enable and _type are
# is_correction_level of 0.11.2.
SCRIPTS = {
    "train_dapo_ray_hybrid_engine.sh": """
        --ref.num_nodes 1 --ref.num_gpus_per_node 8 --actor.num_nodes 1 --actor.num_gpus_per_node 8
        --vllm.num_engines 4 --vllm.tensor_parallel_size 2 --train.colocate_all --vllm.gpu_memory_utilization 0.6
        --algo.kl.init_coef 1e-3 --algo.advantage.gamma 1.0 --algo.kl.use_loss --algo.kl.estimator k3
        --algo.advantage.estimator group_norm --algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 1
        --actor.eps_clip_low_high 0.2 0.27 --reward.remote_url REWARD --ckpt.save_steps 20 --ckpt.save_hf
        --train.micro_batch_size 8 --train.batch_size 128 --rollout.micro_batch_size 16 --rollout.batch_size 128
        --rollout.n_samples_per_prompt 8 --train.max_epochs 1 --data.max_len 2048 --data.max_samples 20000
        --ds.zero_stage 3 --ds.param_dtype bf16 --actor.adam.lr 5e-7 --data.input_key prompt
        --data.apply_chat_template --actor.gradient_checkpointing_enable --ds.packing_samples
        --vllm.sync_backend nccl --vllm.enforce_eager --vllm.enable_sleep --ds.enable_sleep
        --algo.advantage.is_correction_level token""",
    "train_prorlv2_math_hybrid_engine.sh": """
        --ref.num_nodes 1 --ref.num_gpus_per_node 8 --actor.num_nodes 1 --actor.num_gpus_per_node 8
        --vllm.num_engines 8 --vllm.tensor_parallel_size 1 --train.colocate_all --vllm.gpu_memory_utilization 0.75
        --algo.kl.init_coef 1e-4 --algo.advantage.gamma 1.0 --algo.kl.use_loss --algo.kl.estimator k2
        --algo.advantage.estimator reinforce_baseline --algo.dynamic_filtering_enable
        --algo.dynamic_filtering_range 0 1 --actor.eps_clip_low_high 0.2 0.27 --reward.remote_url REWARD
        --ckpt.save_steps 5 --ckpt.save_hf --train.batch_size 1024 --rollout.batch_size 512
        --rollout.n_samples_per_prompt 16 --train.dynamic_batch_enable --train.num_episodes 100 --data.max_len 9216
        --rollout.max_new_tokens 8192 --ds.zero_stage 3 --ds.param_dtype bf16 --actor.adam.lr 1e-6
        --data.input_key prompt --data.label_key label --eval.dataset DATA --eval.steps 5 --eval.temperature 1.0
        --eval.n_samples_per_prompt 4 --data.apply_chat_template --actor.gradient_checkpointing_enable
        --ds.packing_samples --vllm.sync_backend nccl --vllm.enforce_eager --vllm.enable_sleep --ds.enable_sleep
        --algo.advantage.is_correction_level token --algo.advantage.is_correction_threshold 0.5 5.0
        --train.max_tokens_per_gpu 32768 --reward.stop_properly_penalty_coef 0.0""",
    "train_ppo_ray_hybrid_engine.sh": """
        --ref.num_nodes 1 --ref.num_gpus_per_node 8 --reward.num_nodes 1 --reward.num_gpus_per_node 8
        --critic.num_nodes 1 --critic.num_gpus_per_node 8 --actor.num_nodes 1 --actor.num_gpus_per_node 8
        --vllm.num_engines 4 --vllm.tensor_parallel_size 2 --train.colocate_all --vllm.gpu_memory_utilization 0.5
        --reward.model_name_or_path REWARD_MODEL --ckpt.save_hf --train.batch_size 128 --rollout.batch_size 1024
        --rollout.n_samples_per_prompt 1 --train.max_epochs 1 --data.max_len 2048 --data.max_samples 100000
        --ds.zero_stage 3 --ds.param_dtype bf16 --actor.adam.lr 5e-7 --critic.adam.lr 9e-6
        --algo.kl.init_coef 0.01 --data.input_key prompt --data.apply_chat_template --reward.normalize_enable
        --actor.gradient_checkpointing_enable --ds.packing_samples --vllm.sync_backend nccl --vllm.enforce_eager
        --vllm.enable_sleep --ds.enable_sleep --train.dynamic_batch_enable --train.max_tokens_per_gpu 16384
        --algo.advantage.is_correction_level token""",
    "train_ppo_with_reward_fn.sh": """
        --ref.num_nodes 1 --ref.num_gpus_per_node 2 --critic.num_nodes 1 --critic.num_gpus_per_node 2
        --actor.num_nodes 1 --actor.num_gpus_per_node 2 --vllm.num_engines 2 --vllm.tensor_parallel_size 2
        --train.colocate_actor_ref --reward.remote_url REWARD --train.micro_batch_size 8 --train.batch_size 128
        --rollout.micro_batch_size 16 --rollout.batch_size 1024 --data.max_samples 100000 --train.max_epochs 1
        --data.max_len 2048 --ds.zero_stage 3 --ds.param_dtype bf16 --actor.adam.lr 5e-7 --critic.adam.lr 9e-6
        --algo.kl.init_coef 0.01 --data.input_key prompt --data.apply_chat_template --reward.normalize_enable
        --ds.packing_samples --ds.adam_offload --ds.attn_implementation flash_attention_2
        --actor.gradient_checkpointing_enable""",
    "train_reinforce_baseline_hybrid_engine.sh": """
        --ckpt.save_hf --ckpt.max_num 3 --ckpt.save_steps 10 --train.agent_func_path AGENT --data.input_key prompt
        --data.label_key label --data.max_len 74240 --rollout.max_new_tokens 64000 --data.apply_chat_template
        --ds.packing_samples --rollout.batch_size 128 --rollout.n_samples_per_prompt 8 --train.batch_size 1024
        --algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0.0 1.0 --train.dynamic_batch_enable
        --train.max_tokens_per_gpu 16192 --rollout.max_tokens_per_gpu 32768 --train.micro_batch_size 1
        --rollout.micro_batch_size 8 --data.max_samples 128000 --train.max_epochs 1 --train.num_episodes 1
        --ref.num_nodes 1 --ref.num_gpus_per_node 4 --actor.num_nodes 1 --actor.num_gpus_per_node 4
        --vllm.num_engines 2 --vllm.tensor_parallel_size 2 --vllm.gpu_memory_utilization 0.7 --train.colocate_all
        --ds.enable_sleep --vllm.sync_backend nccl --vllm.enforce_eager --ds.zero_stage 3
        --actor.gradient_checkpointing_enable --ds.ring_attn_size 2 --ds.ring_attn_head_stride 2
        --ds.param_dtype bf16 --algo.advantage.estimator reinforce_baseline --actor.adam.lr 5e-7
        --actor.entropy_coef 0.0 --algo.kl.init_coef 1e-5 --algo.kl.use_loss --algo.kl.estimator k2
        --algo.advantage.is_correction_level seq --logger.tensorboard_dir LOGS --logger.logging_steps 1
        --eval.steps -1""",
}

# What a translation leaves out: {flag, or the beginning of flags with *: with which losses}.
NO_CRITIC, OWN = "no critic", "the loss says it"
LEFT_OUT = {
    "critic.*": NO_CRITIC,
    "algo.advantage.estimator": OWN,
    "algo.advantage.gamma": OWN,
    "ref.num_nodes": "the reference is in the policy's actors",
    "ref.num_gpus_per_node": "the reference is in the policy's actors",
    "train.colocate_actor_ref": "the reference is in the policy's actors",
    "rollout.micro_batch_size": "log-probs are taken in the micro-batches of training",
    "rollout.max_tokens_per_gpu": "log-probs are taken in the micro-batches of training",
}
# Of one loss, or of one script: (loss or script, flag) -> what stands there instead.
INSTEAD = {
    ("apo", "actor.eps_clip_low_high"): [],  # no clip
    ("apo", "algo.advantage.is_correction_level"): ["seq"],  # of whole answers
    ("train_ppo_ray_hybrid_engine.sh", "rollout.n_samples_per_prompt"): ["8"],  # a group
    ("train_ppo_ray_hybrid_engine.sh", "ckpt.save_hf"): [],  # no checkpoint is written
    ("train_reinforce_baseline_hybrid_engine.sh", "train.micro_batch_size"): [],  # beside a number of tokens
    ("train_reinforce_baseline_hybrid_engine.sh", "eval.steps"): [],  # of no data set
    ("train_ppo_with_reward_fn.sh", "reward.normalize_enable"): [],  # beside a function it has no effect
    ("train_ppo_ray_hybrid_engine.sh", "rollout.batch_size"): ["128"],  # prompts, of 8 answers now
}
# Without an effect there: the engine is the policy, and the tiny model has no chat template.
NOT_IN_ONE_PROCESS = ("algo.advantage.is_correction_*", "data.apply_chat_template", "ds.*", "reward.num_*")
SMALL = ["--rollout.batch_size", "4", "--rollout.n_samples_per_prompt", "4", "--train.batch_size", "16"]
SMALL += ["--data.max_samples", "20", "--train.num_episodes", "1", "--data.max_len", "48"]
SMALL += ["--rollout.max_new_tokens", "12"]


def by_flag(words: list[str]) -> dict[str, list[str]]:
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            flags[word[2:]] = []
        else:
            flags[list(flags)[-1]].append(word)
    return flags


def is_among(flag: str, names) -> bool:
    return any(flag == name or (name[-1] == "*" and flag.startswith(name[:-1])) for name in names)


def translated(script: str, loss: str) -> list[str]:
    argv = ["--loss", loss]
    for flag, values in by_flag(shlex.split(SCRIPTS[script])).items():
        if is_among(flag, LEFT_OUT):
            continue
        for owner in (loss, script):
            if (owner, flag) in INSTEAD:
                values = INSTEAD[owner, flag] or None
        if values is not None:
            argv += [f"--{flag}", *values]
    return argv


@pytest.fixture
def gpus(monkeypatch, tiny_model, sums, tmp_path):
    """argv -> settings on a machine with GPUs and every optional package; the words in capitals are files here."""
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    monkeypatch.setattr("openrlhf_apo.options.effects.find_spec", lambda name: True)
    monkeypatch.setattr("openrlhf_apo.options.effects.version", lambda name: "9.9.9")
    monkeypatch.setattr("openrlhf_apo.options.check_model._check_reward_model", lambda args: None)
    reward, agent = tmp_path / "reward.py", tmp_path / "agent.py"
    reward.write_text("def reward_func(queries, prompts, labels, **kwargs):\n    return {'rewards': [0.0]}\n")
    agent.write_text("class AgentExecutor: ...\n")
    names = {
        "REWARD": str(reward),
        "DATA": sums,
        "AGENT": str(agent),
        "REWARD_MODEL": tiny_model,
        "LOGS": str(tmp_path),
    }
    base = ["--actor.model_name_or_path", tiny_model, "--data.prompt_dataset", sums, "--apo.device", "cuda"]
    yield lambda argv: resolve([*base, *(names.get(word, word) for word in argv)])
    cpu.decide("auto")


@pytest.mark.parametrize("loss", ["apo", "grpo"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_openrlhf_is_taken_over_by_swapping_the_module_and_naming_a_loss(script, loss, gpus):
    argv = translated(script, loss)
    settings = gpus(argv)
    given = {flag for flag, origin in settings.given.items() if origin == "command line"}
    assert set(by_flag(argv)) <= given


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_left_out_is_refused_by_name(script, gpus):
    for flag, values in by_flag(shlex.split(SCRIPTS[script])).items():
        if is_among(flag, LEFT_OUT):
            with pytest.raises(OptionError, match=f"^--{flag} "):
                gpus([*translated(script, "grpo"), f"--{flag}", *values])


@pytest.mark.parametrize("loss", ["apo", "grpo"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_cpu_can_serve_of_it_runs_five_steps(script, loss, tiny_model, sums, tmp_path):
    (tmp_path / "reward.py").write_text(DIGITS_REWARD)
    (tmp_path / "agent.py").write_text(AGENT)
    names = {"REWARD": tmp_path / "reward.py", "AGENT": tmp_path / "agent.py", "LOGS": tmp_path / "logs"}
    names |= {"DATA": sums, "REWARD_MODEL": save_reward_model(tiny_model, tmp_path / "model", mean=0.5, std=2.0)}
    flags = by_flag(translated(script, loss)) | by_flag(SMALL)
    argv = ["--actor.model_name_or_path", tiny_model, "--data.prompt_dataset", sums, "--runtime", "embedded"]
    for flag, values in flags.items():
        if not needs_ray(flag) and not is_among(flag, NOT_IN_ONE_PROCESS):
            argv += [f"--{flag}", *(str(names.get(value, value)) for value in values)]
    rows = run(argv, tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
