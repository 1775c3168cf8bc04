"""A small tokenizer, a small Qwen3-shaped model, and supervised warm-up: what RL on a laptop starts from."""

import logging
import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

logger = logging.getLogger(__name__)

PAD, EOS = "<|endoftext|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}" + EOS + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts, vocab_size):
    """Byte-level BPE trained on `texts`: any text round-trips, and every digit is a token of its own.

    `vocab_size` >= 256 bytes + 5 special tokens; fewer entries are made when the texts hold fewer merges.
    A chat costs one token per turn besides the content and its end: `<|user|>…<|im_end|><|assistant|>`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(tokenizer, hidden, layers, seed):
    """A float32 Qwen3 with random weights.

    head_dim is 32, the smallest that vLLM's CPU attention takes. The embeddings are untied: a packed `lm_head` that
    shares its weight goes stale, silently, when vLLM reloads weights on CPU.
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
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def chat_prompt(tokenizer, prompt):
    """The text the model is given for `prompt`, as OpenRLHF renders it under --data.apply_chat_template."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def warm_up(model, tokenizer, rows, steps, batch_size=64, lr=2e-3, seed=0):
    """Supervised steps on `prompt` -> `completion` rows, in place; the loss is on completion tokens only.

    AdamW, 10 % linear warm-up, then a cosine to zero. Rows come in seeded random order, epoch after epoch.
    """
    examples = []
    for row in rows:
        prompt = tokenizer.encode(chat_prompt(tokenizer, row["prompt"]), add_special_tokens=False)
        completion = tokenizer.encode(row["completion"] + EOS, add_special_tokens=False)
        examples.append((prompt + completion, len(prompt)))

    order = torch.Generator().manual_seed(seed)
    queue = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    for step in range(1, steps + 1):
        while len(queue) < batch_size:
            queue += torch.randperm(len(examples), generator=order).tolist()
        batch, queue = [examples[i] for i in queue[:batch_size]], queue[batch_size:]
        width = max(len(ids) for ids, _ in batch)
        tokens = torch.full((len(batch), width), tokenizer.pad_token_id)  # [B, T]
        is_target = torch.zeros(len(batch), width, dtype=torch.bool)  # [B, T]
        for i, (ids, prompt_length) in enumerate(batch):
            tokens[i, : len(ids)] = torch.tensor(ids)
            is_target[i, prompt_length : len(ids)] = True
        # Padding is on the right and attention is causal, so no attention mask is needed.
        hidden = model.model(tokens[:, :-1]).last_hidden_state
        loss = F.cross_entropy(model.lm_head(hidden[is_target[:, 1:]]), tokens[:, 1:][is_target[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % max(1, steps // 10) == 0:
            logger.info("warm-up step %d/%d  loss %.3f", step, steps, loss.item())
    model.eval()
    return model
