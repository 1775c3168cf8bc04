"""OpenRLHF 0.11.2's Actor, its computation written out in plain torch, to measure where OpenRLHF is not installed.

No benchmark of its own. tests/test_benchmarks.py holds it equal to the Actor.
"""

import torch
from torch import Tensor, nn


def upstream_log_probs(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, action_mask: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probs [B, T-1] of the next tokens, 0 where action_mask[B, T-1] is 0: openrlhf/models/actor.py, 221-300,
    without packing, images and ring attention."""
    labels = torch.roll(sequences, shifts=-1, dims=1)  # line 243
    positions = attention_mask.long().cumsum(-1) - 1  # lines 262 and 263
    positions.masked_fill_(attention_mask == 0, 1)
    # Line 265. Actor.__init__ has switched the cache off in the configuration, line 210.
    output = model(sequences, attention_mask=attention_mask, position_ids=positions, use_cache=False)
    output["logits"] = output["logits"].to(torch.float32)  # line 267: all positions, [B, T, V]
    if temperature != 1.0:
        output["logits"].div_(temperature)  # line 271
    log_probs = _log_probs_from_logits(output["logits"], labels)[:, :-1]  # lines 289 and 294
    return log_probs[:, -action_mask.shape[1] :] * action_mask.float()  # line 298


def _log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """openrlhf/models/utils.py, lines 176-188: flash-attn's Triton kernel where it is there, as upstream."""
    shape, flat = logits.shape[:-1], logits.reshape(-1, logits.shape[-1])
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    except ImportError:
        chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
        normaliser = torch.zeros(len(flat), dtype=flat.dtype, device=flat.device)  # _logsumexp_by_chunk, line 162
        for start in range(0, len(flat), 1024):
            normaliser[start : start + 1024] = torch.logsumexp(flat[start : start + 1024], dim=-1)
        return chosen - normaliser.view(shape)
    return -cross_entropy_loss(flat, labels.reshape(-1))[0].view(shape)
