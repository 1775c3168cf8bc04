"""Log-probs of a causal model's responses, without a tensor [tokens, vocabulary] that outlives a block of it.

The model runs as it is, but its output matrix is handed its last hidden states together with the tokens to come, and
gives back their log-probs and entropies in place of logits: at the positions of response tokens only, and over the
vocabulary in blocks. Kept for backward are the hidden states and three numbers per token; logits are computed again.

Torch and transformers alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from openrlhf_apo.ranks.shared_prompts import SharedPrompts

BLOCK = {"cpu": 2**22, "cuda": 2**26}  # elements of a block of logits; 2^19 to 2^23 are equally fast on a CPU


def response_log_probs(
    model: nn.Module,
    sequences: Tensor,
    attention_mask: Tensor,
    action_mask: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    packed: bool = False,
    blockwise: bool = True,
    share_prompts: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(log π of each next token, entropy of the distribution it was drawn from or None): float32 [B, T-1], nats, 0
    where action_mask[B, T-1] is 0.

    sequences, attention_mask: [B, T], padded on the right. packed: the model sees the samples without their padding,
    one behind the other in one row, told apart by position_ids. blockwise: False for a model whose logits are not its
    last hidden states times a matrix (`has_plain_head`). share_prompts: each prompt goes through the model once for
    its answers, where that spares enough (`can_share_prompts`; neither packed nor without blocks).
    """
    places = action_mask > 0  # [B, T-1]
    tokens = sequences[:, 1:][places]  # [N]
    shared = SharedPrompts.of(sequences, places) if share_prompts and blockwise and not packed else None
    if shared is not None:
        output_matrix = _output_matrix(model)
        with _computing(output_matrix, lambda states: states):
            states = shared.states(model)
        log_probs, *entropies = _TokenStatistics.apply(states, output_matrix.weight, tokens, temperature, entropy)
        return _placed(log_probs, places), _placed(entropies[0], places) if entropy else None
    where = nn.functional.pad(places, (0, 1))  # [B, T], of the states from which those tokens are predicted
    if packed:
        real = attention_mask > 0
        where = where[real][None]  # [1, all samples' tokens]
        positions = attention_mask.cumsum(-1)[real] - 1
        inputs = {"input_ids": sequences[real][None], "position_ids": positions[None]}
    else:
        inputs = {"input_ids": sequences}  # a token never sees the padding behind it: there is nothing to mask
    if blockwise:

        def head(states: Tensor) -> Tensor:
            return _TokenStatistics.apply(states[where], output_matrix.weight, tokens, temperature, entropy)

        output_matrix = _output_matrix(model)
        with _computing(output_matrix, head):
            log_probs, *entropies = model(**inputs, use_cache=False).logits
    else:
        logits = model(**inputs, use_cache=False).logits[where].float() / temperature  # [N, V]
        normaliser = logits.logsumexp(-1)
        log_probs = logits.gather(-1, tokens[:, None])[:, 0] - normaliser
        entropies = [normaliser - (logits.softmax(-1) * logits).sum(-1)] if entropy else []
    return _placed(log_probs, places), _placed(entropies[0], places) if entropy else None


@torch.no_grad()
def has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are what its output matrix, without a bias, makes of its last hidden states: some
    cap or scale them afterwards, or wrap the matrix."""
    matrix = _output_matrix(model)
    if type(matrix) is not nn.Linear or matrix.bias is not None:
        return False
    made: list[Tensor] = []

    def head(states: Tensor) -> Tensor:
        made.append(torch.linspace(-1e3, 1e3, 4, device=states.device))
        return made[0]

    with _computing(matrix, head):
        logits = model(torch.tensor([[0, 1]], device=matrix.weight.device), use_cache=False).logits
    return len(made) == 1 and logits.shape == made[0].shape and torch.equal(logits.float(), made[0])


class _TokenStatistics(torch.autograd.Function):
    """states[N, H], weight[V, H], tokens[N] -> [1, N] log softmax(states weightᵀ / temperature) at `tokens`, with
    `entropy` [2, N]: the entropies of the softmax below it."""

    @staticmethod
    def forward(ctx, states, weight, tokens, temperature, entropy):
        rows, device = len(states), states.device
        largest = torch.full((rows,), -torch.inf, device=device)  # of the logits seen so far
        total = torch.zeros(rows, device=device)  # Σ exp(logit − largest)
        moment = torch.zeros(rows, device=device)  # Σ exp(logit − largest) · (logit − largest)
        chosen = torch.zeros(rows, device=device)
        for start, logits in _blocks(states, weight, temperature):
            here = (tokens >= start) & (tokens < start + logits.shape[1])
            at = (tokens - start).clamp(0, logits.shape[1] - 1)
            chosen = torch.where(here, logits.gather(-1, at[:, None])[:, 0], chosen)
            before, largest = largest, torch.maximum(largest, logits.amax(-1))
            shift = before - largest  # −inf at first, where what it scales is 0
            scale = shift.exp()
            logits -= largest[:, None]
            if entropy:
                exponentials = logits.exp()
                moment = scale * moment + torch.where(total > 0, scale * shift * total, 0.0)
                moment += (exponentials * logits).sum(-1)
            else:
                exponentials = logits.exp_()
            total = scale * total + exponentials.sum(-1)
        normaliser = largest + total.log()
        found = [chosen - normaliser]
        if entropy:
            found.append(total.log() - moment / total)
        ctx.save_for_backward(states, weight, tokens, normaliser, *found[1:])
        ctx.temperature = temperature
        return torch.stack(found)

    @staticmethod
    def backward(ctx, gradients):
        states, weight, tokens, normaliser, *entropies = ctx.saved_tensors
        of_log_prob = gradients[0] / ctx.temperature  # [N]
        of_states = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start, logits in _blocks(states, weight, ctx.temperature):
            width = logits.shape[1]
            logits -= normaliser[:, None]  # log-probs, from here on
            if entropies:  # dH/dlogit = −p (log p + H)
                of_entropy = gradients[1] / ctx.temperature
                factor = (logits + entropies[0][:, None]).mul_(-of_entropy[:, None]).sub_(of_log_prob[:, None])
                block = logits.exp_().mul_(factor)
            else:
                block = logits.exp_().mul_(-of_log_prob[:, None])
            here = ((tokens >= start) & (tokens < start + width)).nonzero()[:, 0]
            block[here, tokens[here] - start] += of_log_prob[here]
            block = block.to(weight.dtype)
            of_states += block @ weight[start : start + width]
            if of_weight is not None:
                torch.mm(block.T, states, out=of_weight[start : start + width])
        return of_states.to(states.dtype), of_weight, None, None, None


def _blocks(states: Tensor, weight: Tensor, temperature: float) -> Iterator[tuple[int, Tensor]]:
    """(first column, logits[N, width] in float32) over the vocabulary. A block may be written to."""
    width = max(1, BLOCK[states.device.type] // max(1, len(states)))
    for start in range(0, len(weight), width):
        logits = (states @ weight[start : start + width].T).float()
        yield start, logits if temperature == 1.0 else logits.div_(temperature)


def _output_matrix(model: nn.Module) -> nn.Module:
    """Of a transformers model, or of one in a DeepSpeed engine, which passes attributes on."""
    return model.get_output_embeddings()


@contextmanager
def _computing(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module` computes `forward` in place of its own. Its hooks (ZeRO-3's gathering) stay around it."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _placed(values: Tensor, places: Tensor) -> Tensor:
    """values of the places that are True, in order -> the shape of `places`, 0 elsewhere."""
    return torch.zeros(places.shape, dtype=values.dtype, device=values.device).masked_scatter(places, values)
