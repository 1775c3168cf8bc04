"""Blockwise log-probs and entropies against the plain path: values, gradients, memory, and which models take them."""

import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_qwen3
from transformers import AutoModelForCausalLM, Gemma2Config

from openrlhf_apo.ranks import log_probs
from openrlhf_apo.ranks.log_probs import has_plain_head, response_log_probs

VOCABULARY = 37
LENGTHS = [(3, 4), (1, 6), (5, 1), (2, 2)]  # prompt and response tokens


def qwen3(tied: bool = True, dtype: torch.dtype = torch.float32):
    model = tiny_qwen3(VOCABULARY, tied)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # far from uniform
    return model.to(dtype)


def batch():
    width = max(p + r for p, r in LENGTHS)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(0, VOCABULARY, (len(LENGTHS), width), generator=generator)
    attention = torch.tensor([[1] * (p + r) + [0] * (width - p - r) for p, r in LENGTHS])
    action = torch.tensor([[0] * (p - 1) + [1] * r + [0] * (width - p - r) for p, r in LENGTHS])
    return sequences, attention, action


def plain(model, sequences, attention, action, temperature):
    """As one writes it down: all logits, float32, with the attention mask."""
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(sequences, attention_mask=attention, position_ids=positions, use_cache=False).logits
    all_log_probs = (logits.float() / temperature).log_softmax(-1)[:, :-1]
    found = all_log_probs.gather(-1, sequences[:, 1:, None])[..., 0]
    entropies = -(all_log_probs.exp() * all_log_probs).sum(-1)
    return found * action, entropies * action


def gradients(model, log_probs, entropies, seed=2):
    """Of a sum in which every token has a weight of its own."""
    weights = torch.rand(2, *log_probs.shape, generator=torch.Generator().manual_seed(seed)) - 0.3
    loss = (weights[0] * log_probs).sum()
    if entropies is not None:
        loss = loss + (weights[1] * entropies).sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([gradient.double().flatten() for gradient in found])


@pytest.mark.parametrize("block", [1, 50, 2**20], ids=["a column", "some columns", "the whole vocabulary"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("temperature, entropy", [(1.0, False), (0.7, True), (1.3, False), (1.0, True)])
def test_values_and_gradients_are_the_plain_ones(monkeypatch, block, packed, tied, temperature, entropy):
    monkeypatch.setitem(log_probs.BLOCK, "cpu", block)
    model, inputs = qwen3(tied), batch()
    want, want_entropies = plain(model, *inputs, temperature)
    got, got_entropies = response_log_probs(
        model, *inputs, temperature=temperature, entropy=entropy, packed=packed, blockwise=True
    )
    assert torch.allclose(got, want, atol=2e-6) and got.dtype == torch.float32
    assert (got_entropies is not None) == entropy
    if entropy:
        assert torch.allclose(got_entropies, want_entropies, atol=2e-6)
    expected = gradients(model, want, want_entropies if entropy else None)
    error = (gradients(model, got, got_entropies) - expected).norm() / expected.norm()
    assert error <= 1e-6


@pytest.mark.parametrize("entropy", [False, True])
def test_without_blocks_it_is_the_same(entropy):
    model, inputs = qwen3(), batch()
    blocks = response_log_probs(model, *inputs, temperature=0.9, entropy=entropy)
    whole = response_log_probs(model, *inputs, temperature=0.9, entropy=entropy, blockwise=False)
    assert torch.allclose(blocks[0], whole[0], atol=2e-6)
    expected = gradients(model, *whole)
    assert (gradients(model, *blocks) - expected).norm() / expected.norm() <= 1e-6


def test_in_bf16_it_is_no_further_from_the_truth_than_the_plain_path(monkeypatch):
    monkeypatch.setitem(log_probs.BLOCK, "cpu", 50)
    model, inputs = qwen3(dtype=torch.bfloat16), batch()
    exact = qwen3(dtype=torch.bfloat16).double()
    truth = gradients(exact, *plain(exact, *inputs, 0.8))
    of_plain = gradients(model, *plain(model, *inputs, 0.8))
    of_blocks = gradients(model, *response_log_probs(model, *inputs, temperature=0.8, entropy=True))
    assert (of_blocks - truth).norm() <= 1.1 * (of_plain - truth).norm()


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(3)
    states, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    tokens, directions = torch.tensor([0, 10, 3, 3, 7]), torch.randn(2, 5)

    def value(states, weight):
        found = log_probs._TokenStatistics.apply(states.float(), weight.float(), tokens, 0.8, True)
        return (found * directions).sum()

    states.requires_grad_(), weight.requires_grad_()
    analytic = torch.autograd.grad(value(states, weight), (states, weight))
    for tensor, gradient in zip((states, weight), analytic, strict=True):
        step = torch.randn_like(tensor)
        with torch.no_grad():
            moved = [
                value(*((t + sign * 1e-2 * step) if t is tensor else t for t in (states, weight))) for sign in (1, -1)
            ]
        assert (moved[0] - moved[1]).item() / 2e-2 == pytest.approx((gradient * step).sum().item(), rel=2e-3)


@pytest.mark.parametrize("blockwise", [True, False])
def test_no_logits_are_kept_for_backward(monkeypatch, blockwise):
    monkeypatch.setitem(log_probs.BLOCK, "cpu", 50)
    kept = set()
    model, inputs = qwen3(), batch()
    weights = {tuple(weight.shape) for weight in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(tuple(t.shape)) or t, lambda t: t):
        response_log_probs(model, *inputs, entropy=True, blockwise=blockwise)
    logits = [shape for shape in kept if VOCABULARY in shape and shape not in weights and shape[::-1] not in weights]
    assert bool(logits) != blockwise


def test_a_frozen_output_matrix_gets_no_gradient():
    model, inputs = qwen3(tied=False), batch()
    model.lm_head.requires_grad_(False)
    response_log_probs(model, *inputs)[0].sum().backward()
    assert model.lm_head.weight.grad is None and model.model.embed_tokens.weight.grad is not None


def test_a_model_that_caps_its_logits_is_told_from_one_that_does_not():
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=30.0,
    )
    assert not has_plain_head(AutoModelForCausalLM.from_config(config))
    assert has_plain_head(qwen3())
    biased = qwen3(tied=False)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    assert not has_plain_head(biased)


def test_torch_and_transformers_are_enough():
    code = (
        "import sys, openrlhf_apo.ranks.log_probs\n"
        "assert not {'openrlhf', 'deepspeed', 'ray', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
