"""Models of a few thousand parameters, made in memory."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig


def tiny_qwen3(vocabulary: int, tied: bool = False) -> PreTrainedModel:
    """Random float32 weights, the same each time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def save_experts(dense: str, to: Path) -> str:
    """A mixture of four experts, two for each token, of the shape and with the tokenizer of a folder's dense model."""
    shutil.copytree(dense, to, dirs_exist_ok=True)
    torch.manual_seed(0)
    shape = Qwen3Config.from_pretrained(dense).to_dict()
    for name in ("model_type", "architectures", "layer_types"):
        del shape[name]
    config = Qwen3MoeConfig(
        **shape, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(to)
    return str(to)


def save_reward_model(policy: str, to: Path, head: str = "score", **config) -> str:
    """The policy's folder as that of a reward model: other weights, no output matrix, a value head of one output."""
    shutil.copytree(policy, to, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(to / "model.safetensors").items()
        if name != "lm_head.weight"
    }
    hidden = weights["model.norm.weight"].shape[0]
    weights[f"{head}.weight"] = torch.randn(1, hidden, generator=generator) / hidden**0.5
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    settings = json.loads((to / "config.json").read_text()) | {"architectures": ["RewardModel"]} | config
    (to / "config.json").write_text(json.dumps(settings))
    return str(to)
