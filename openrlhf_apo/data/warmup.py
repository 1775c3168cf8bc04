"""A small tokenizer, a small Qwen3-shaped model and its supervised warm-up: what RL on a laptop starts from."""

import logging
import random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from openrlhf_apo.data.muon import Muon

logger = logging.getLogger(__name__)

PAD, EOS = "<|endoftext|>", "<|im_end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`: any text comes back exactly, and every digit is a token of its own.

    `vocab_size` counts the 256 bytes and 5 special tokens; it is an upper limit, reached when the texts hold enough
    merges. The chat template costs three tokens beside the question: `<|user|>…<|im_end|><|assistant|>`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer, hidden: int, layers: int, seed: int) -> Qwen3ForCausalLM:
    """A float32 Qwen3 with random weights.

    head_dim is 32, the smallest that vLLM's CPU attention takes. Embeddings are untied, because on CPU vLLM packs
    `lm_head` apart and a reload of tied weights would leave it stale, silently.
    """
    heads = hidden // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def chat_prompt(tokenizer, question: str) -> str:
    """The text that stands before a completion: what OpenRLHF makes of it under --data.apply_chat_template."""
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


LABEL_SMOOTHING = 0.05  # the model knows more than it dares to sample, as base models do: that is what RL brings out


def warm_up(model, tokenizer, rows, steps: int, target: float = 1.0, batch_size: int = 32, lr: float = 3e-3, seed=0):
    """Teach `model`, in place, to answer each row's `prompt` with its `completion` and an EOS.

    Stops after `steps`, or sooner, once the chance of sampling the whole completion at temperature 1 (the product of
    its token probabilities) has averaged `target` over the last 20 batches. So RL starts from the same place whatever
    the seed. Returns that average. The loss is on completion tokens only.

    Muon for the matrices inside the layers, AdamW for the rest: with AdamW alone a tiny model needs several times the
    steps to find out how carrying works. On one thread: the weights then repeat on any machine of the same kind, and
    a second thread gains a model of this size next to nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    optimizers = [
        Muon(matrices, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    ramps = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50) for optimizer in optimizers]
    batches = _batches(rows, batch_size, seed)
    recent = []
    model.train()
    for step in range(1, steps + 1):
        tokens, is_target = _collate(tokenizer, next(batches))  # [B, T], [B, T]
        hidden = model.model(tokens[:, :-1]).last_hidden_state
        is_next = is_target[:, 1:]
        logits, next_tokens = model.lm_head(hidden[is_next]), tokens[:, 1:][is_next]
        loss = F.cross_entropy(logits, next_tokens, label_smoothing=LABEL_SMOOTHING)
        token_nll = F.cross_entropy(logits.detach(), next_tokens, reduction="none")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, ramp in zip(optimizers, ramps, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            ramp.step()

        row_nll = torch.zeros(len(tokens)).index_add(0, is_next.nonzero()[:, 0], token_nll)  # [B]
        recent = [*recent[-19:], row_nll.neg().exp().mean().item()]
        chance = sum(recent) / len(recent)
        if step % 100 == 0:
            logger.info("warm-up step %d: loss %.3f, chance of the right completion %.3f", step, loss.item(), chance)
        if step >= 20 and chance >= target:
            break
    model.eval()
    torch.set_num_threads(threads)
    logger.info("warm-up done after %d steps: chance of the right completion %.3f", step, chance)
    return chance


def _batches(rows, batch_size, seed):
    """Endless batches in seeded random order; rows of like length go together, so that little is padding."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(rows, len(rows))
        for start in range(0, len(order), 8 * batch_size):
            chunk = sorted(order[start : start + 8 * batch_size], key=lambda row: len(row["prompt"]))
            batches = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
            yield from rng.sample(batches, len(batches))


def _collate(tokenizer, rows):
    """Token ids [B, T], and where they are completion [B, T]. Padded on the right: causal attention never sees it."""
    prompts = [tokenizer.encode(chat_prompt(tokenizer, row["prompt"]), add_special_tokens=False) for row in rows]
    completions = [tokenizer.encode(row["completion"] + EOS, add_special_tokens=False) for row in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, completions, strict=True))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    is_target = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(answer)
        tokens[i, :end] = torch.tensor(prompt + answer)
        is_target[i, len(prompt) : end] = True
    return tokens, is_target
