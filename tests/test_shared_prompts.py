"""Prompts that go through the model once: values, gradients, and how many tokens that takes."""

import pytest
import torch
from test_log_probs import VOCABULARY, gradients, plain, qwen3
from transformers import Gemma2Config, Gemma2ForCausalLM

from openrlhf_apo.ranks import shared_prompts
from openrlhf_apo.ranks.log_probs import response_log_probs
from openrlhf_apo.ranks.shared_prompts import can_share_prompts

# (prompt, tokens of it, tokens of the answer); 0 at their beginning looks like padding
SAMPLES = [("a", 5, 3), ("b", 2, 6), ("a", 5, 1), ("c", 4, 2), ("b", 2, 1), ("a", 5, 6), ("d", 1, 4)]


def batch(samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    prompts = {}
    for name, length, _ in samples:
        prompts.setdefault(name, torch.randint(0, VOCABULARY, (length,), generator=generator))
        prompts[name][0] = 0
    width = max(p + r for _, p, r in samples)
    sequences, attention, action = (torch.zeros(len(samples), n, dtype=torch.long) for n in (width, width, width - 1))
    for row, (name, p, r) in enumerate(samples):
        sequences[row, :p] = prompts[name]
        sequences[row, p : p + r] = torch.randint(0, VOCABULARY, (r,), generator=generator)
        attention[row, : p + r] = 1
        action[row, p - 1 : p + r - 1] = 1
    return sequences, attention, action


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(shared_prompts, "FEWEST_SPARED", 1)


@pytest.mark.parametrize("temperature, entropy", [(1.0, False), (0.7, True)])
@pytest.mark.parametrize(
    "samples",
    [SAMPLES, [("a", 4, 3), ("a", 4, 5)], [("a", 3, 1), ("b", 3, 1), ("a", 3, 1)]],
    ids=["of all lengths", "one prompt", "answers of one token"],
)
def test_values_and_gradients_are_those_of_whole_sequences(always, samples, temperature, entropy):
    model, inputs = qwen3().train(), batch(samples)
    want, want_entropies = plain(model, *inputs, temperature)
    got, entropies = response_log_probs(model, *inputs, temperature=temperature, entropy=entropy, share_prompts=True)
    assert torch.allclose(got, want, atol=2e-6)
    assert not entropy or torch.allclose(entropies, want_entropies, atol=2e-6)
    expected = gradients(model, want, want_entropies if entropy else None)
    error = (gradients(model, got, entropies) - expected).norm() / expected.norm()
    assert error <= 1e-6


def test_an_answer_with_tokens_that_are_not_trained(always):
    model, (sequences, attention, action) = qwen3(), batch()
    action[0, 6], action[5, 5:8] = 0, 0  # what an environment said, between two turns
    want, _ = plain(model, sequences, attention, action, 1.0)
    got, _ = response_log_probs(model, sequences, attention, action, share_prompts=True)
    assert torch.allclose(got, want, atol=2e-6)


def tokens_seen(model, inputs, **options) -> int:
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, _: seen.append(args[0].numel()))
    response_log_probs(model, *inputs, **options)
    handle.remove()
    return sum(seen)


def test_each_prompt_is_computed_once(always):
    model, inputs = qwen3(), batch()
    longest_prompt, longest_answer = 5, 6
    assert tokens_seen(model, inputs, share_prompts=True) == 4 * longest_prompt + 7 * (longest_answer - 1)
    assert tokens_seen(model, inputs) == 7 * (5 + 6)


def test_where_little_is_spared_the_sequences_stay_whole(monkeypatch):
    model, inputs = qwen3(), batch()
    spared = 3 * 5  # samples whose prompt another one has, x tokens of the longest prompt
    for limit, whole in ((spared, False), (spared + 1, True)):
        monkeypatch.setattr(shared_prompts, "FEWEST_SPARED", limit)
        assert (tokens_seen(model, inputs, share_prompts=True) == 7 * (5 + 6)) == whole


def test_which_models_can():
    model = qwen3()
    assert can_share_prompts(model)
    model.gradient_checkpointing_enable()
    assert not can_share_prompts(model)
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    sliding = Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCABULARY, num_hidden_layers=2, sliding_window=4, **sizes))
    assert not can_share_prompts(sliding)
