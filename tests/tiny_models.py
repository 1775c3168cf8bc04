"""Models of a few thousand parameters, made in memory."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config


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
