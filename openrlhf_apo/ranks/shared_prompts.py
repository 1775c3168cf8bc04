"""Each prompt of a micro-batch through the model once, for all the answers to it that the micro-batch holds.

Answers continue from the keys and values of their prompt, where their gradients add up: the numbers and gradients of
whole sequences, to rounding, from fewer tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

FEWEST_SPARED = 384  # tokens; for much fewer, a second call costs what it spares (benchmarks/shared_prompts.py)


def can_share_prompts(model: nn.Module) -> bool:
    """Whether every layer attends to all keys before it, and training keeps them: gradient checkpointing does not."""
    layers = DynamicCache(config=model.get_decoder().config).layers
    return all(type(layer) is DynamicLayer for layer in layers) and not model.is_gradient_checkpointing


@dataclass(frozen=True)
class SharedPrompts:
    """B samples of U different prompts. Prompts are padded on the left, answers on the right."""

    prompts: Tensor  # [U, Tp]
    mask: Tensor  # [U, Tp], 0 at padding
    of_sample: Tensor  # [B], the row of its prompt
    lengths: Tensor  # [B], of its prompt, tokens
    answers: Tensor  # [B, R], what follows the prompt
    places: Tensor  # bool [B, R], which of these tokens are to be predicted

    @classmethod
    def of(cls, sequences: Tensor, places: Tensor) -> "SharedPrompts | None":
        """None where that would spare too little. sequences: [B, T]; places: bool [B, T-1], whether the next token is
        to be predicted. A prompt is all that stands before the first of those."""
        lengths = places.int().argmax(-1) + 1
        longest = int(lengths.max())
        source = torch.arange(longest, device=sequences.device) - (longest - lengths)[:, None]  # [B, Tp]
        padded = sequences.gather(1, source.clamp(min=0)).masked_fill(source < 0, 0)
        rows, of_sample = torch.cat([lengths[:, None], padded], -1).unique(dim=0, return_inverse=True)
        if (len(sequences) - len(rows)) * longest < FEWEST_SPARED:
            return None
        mask = torch.arange(longest, device=sequences.device) >= longest - rows[:, :1]
        ends = places.shape[1] - places.flip(-1).int().argmax(-1)  # [B], after the last token to be predicted
        source = lengths[:, None] + torch.arange(int((ends - lengths).max()) + 1, device=sequences.device)  # [B, R]
        inside, source = source < sequences.shape[1], source.clamp(max=sequences.shape[1] - 1)
        answers, answered = sequences.gather(1, source), places.gather(1, source - 1) & inside
        return cls(rows[:, 1:], mask.long(), of_sample, lengths, answers, answered)

    def states(self, model: nn.Module) -> Tensor:
        """[N, H], from which the tokens at `places` are predicted, in order. model: gives its last hidden states for
        logits."""
        cache, width = DynamicCache(config=model.get_decoder().config), self.answers.shape[1]
        padded = not bool(self.mask.all())
        first = model(
            self.prompts,
            attention_mask=self.mask if padded else None,
            position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        states = first[self.of_sample]  # [B, 1, H]
        if width > 1:
            cache.batch_select_indices(self.of_sample)
            mask = nn.functional.pad(self.mask[self.of_sample], (0, width - 1), value=1)
            further = model(
                self.answers[:, :-1],
                attention_mask=mask if padded else None,
                position_ids=self.lengths[:, None] + torch.arange(width - 1, device=mask.device),
                past_key_values=cache,
                use_cache=True,
            ).logits
            states = torch.cat([states, further], 1)
        return states[self.places]
