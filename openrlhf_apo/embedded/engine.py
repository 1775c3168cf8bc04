"""Samples from the policy's own weights: no second copy, no sync.

A batch of prompts is prefilled once, each prompt once for its whole group; then one token per step for every answer
that is not finished. Answers that are finished leave the batch when enough of them have.

Each answer has random numbers of its own, drawn from (seed, prompt, place in the group) before sampling starts: what
it is does not depend on which other answers share its batch, apart from the rounding of the logits.
"""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from openrlhf_apo.embedded.cache import roomy_cache
from openrlhf_apo.errors import RunError
from openrlhf_apo.trainer.completions import Completion, Prefix, Request, encode, samples_of, seed_of
from openrlhf_apo.trainer.handles import Pending, SamplingSettings
from openrlhf_apo.trainer.samples import Prompt, Sample

WIDTH = 128  # of the vocabulary's blocks that a token is looked for in
MOST_FINISHED = 0.25  # of the rows, before they are taken out: taking out copies the cache


class EmbeddedEngine:
    """EngineHandle. batch: answers that are sampled at once."""

    restarts = 0  # it lives and dies with the run
    own_weights = False

    def __init__(self, model: nn.Module, tokenizer, batch: int = 1024):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        self.stop_ids = sorted({stop for stop in [*stops, tokenizer.eos_token_id] if stop is not None})

    def sync_weights(self) -> None:
        """The weights are the policy's own."""

    def check_weights(self) -> None:
        pass

    def rest(self) -> None:
        """It holds nothing between two calls."""

    def generate(
        self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None = None
    ) -> list[Sample]:
        beginnings = [encode(self.tokenizer, prompt, settings, prefix) for prompt in prompts]
        ids = [beginning.ids for beginning in beginnings]
        seeds = [seed_of(prompt, settings, guided=prefix is not None) for prompt in prompts]
        limits = [settings.max_new_tokens or settings.max_len - len(each) for each in ids]
        how = Sampling(settings.temperature, settings.top_p)
        completions = self._sample(ids, seeds, limits, settings.samples_per_prompt, how)
        return samples_of(self.tokenizer, prompts, beginnings, completions)

    def begin(self, prompts: list[Prompt], settings: SamplingSettings, prefix: Prefix | None = None) -> Pending:
        samples = self.generate(prompts, settings, prefix)
        return lambda: samples

    def complete(self, requests: list[Request]) -> list[Completion]:
        """Of like length together, so that little is padding."""

        def how(i: int) -> Sampling:
            return Sampling(requests[i].temperature, requests[i].top_p)

        completions: dict[int, Completion] = {}
        order = sorted(range(len(requests)), key=lambda i: (how(i), len(requests[i].ids)))
        for sampling, alike in groupby(order, how):
            places = list(alike)
            ids, seeds, _, _, limits = map(list, zip(*(requests[i] for i in places), strict=True))
            found = self._sample(ids, seeds, limits, 1, sampling)
            completions |= {i: completion for i, (completion,) in zip(places, found, strict=True)}
        return [completions[i] for i in range(len(requests))]

    @torch.no_grad()
    def _sample(
        self, ids: list[list[int]], seeds: list[int], limits: list[int], count: int, how: "Sampling"
    ) -> list[list[Completion]]:
        """`count` completions of each prompt of at most so many tokens."""
        self.model.eval()
        per_call = max(1, self.batch // count)
        completions: list[list[Completion]] = []
        for start in range(0, len(ids), per_call):
            part = slice(start, start + per_call)
            completions += Answers(
                self.model, ids[part], seeds[part], limits[part], count, how, self.stop_ids
            ).sample()
        return completions


class Sampling(NamedTuple):
    """The distribution that a token is drawn from, given the policy's."""

    temperature: float
    top_p: float


class Answers:
    """One call: `count` answers for each of G prompts; row i belongs to prompt i // count. limits[G]: their tokens."""

    def __init__(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        seeds: list[int],
        limits: list[int],
        count: int,
        how: Sampling,
        stops: list[int],
    ):
        self.model, self.count, self.how = model, count, how
        longest = max(map(len, prompts))
        self.limits = torch.tensor(limits).repeat_interleave(count)
        self.steps, rows = max(limits), len(self.limits)
        self.uniforms = torch.stack([_uniforms(seed, k, self.steps) for seed in seeds for k in range(count)])
        self.tokens = torch.zeros(rows, self.steps, dtype=torch.long)
        self.log_probs = torch.zeros(rows, self.steps)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.stopped = torch.zeros(rows, dtype=torch.bool)  # by a stop token, and not by the limit
        self.stops = torch.tensor(stops)
        self.padded = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])  # [G, T], from the left
        self.mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])

    def sample(self) -> list[list[Completion]]:
        """`count` completions of each prompt."""
        device, count = self.model.device, self.count
        cache = roomy_cache(self.model, self.steps)
        mask = self.mask.to(device)
        logits = self.model(
            self.padded.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        cache.batch_repeat_interleave(count)
        logits, mask = logits.repeat_interleave(count, 0), mask.repeat_interleave(count, 0)
        positions = mask.sum(-1, keepdim=True)  # [rows, 1], of the next token
        rows = torch.arange(len(self.limits))  # those still in the batch
        going = torch.ones(len(rows), dtype=torch.bool)
        for t in range(self.steps):
            chosen, log_probs = choose(logits.float().cpu(), self.uniforms[rows, t], self.how)
            active = rows[going]
            self.tokens[active, t], self.log_probs[active, t] = chosen[going], log_probs[going]
            self.lengths[active] = t + 1
            stop = torch.isin(chosen, self.stops)
            self.stopped[active] = stop[going]
            going &= ~stop & (self.limits[rows] > t + 1)
            if not going.any():
                break
            if going.float().mean() < 1 - MOST_FINISHED:
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep.to(device))
                rows, chosen, going = rows[keep], chosen[keep], going[keep]
                mask, positions = mask[keep.to(device)], positions[keep.to(device)]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            logits = self.model(
                chosen[:, None].to(device),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            positions = positions + 1
        rows = [
            Completion(self.tokens[i, :n].tolist(), self.log_probs[i, :n].tolist(), not stopped)
            for i, (n, stopped) in enumerate(zip(self.lengths.tolist(), self.stopped.tolist(), strict=True))
        ]
        return [rows[start : start + count] for start in range(0, len(rows), count)]


def choose(logits: Tensor, uniforms: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """logits[rows, V], uniforms[rows] in [0, 1) -> (token[rows], its log-prob[rows] in what it was drawn from).

    The token is where the cumulative distribution passes the uniform number, found first among blocks of the
    vocabulary and then in one; at temperature 0 it is the likeliest.
    """
    if how.temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token[:, 0], logits.log_softmax(-1).gather(-1, token)[:, 0]
    if how.temperature != 1:
        logits = logits / how.temperature
    if how.top_p < 1:
        logits = _nucleus(logits.log_softmax(-1), how.top_p)
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise RunError("the policy's logits are not finite: its weights hold NaN or Inf; go back to a checkpoint")
    weights = nn.functional.pad((logits - largest).exp_(), (0, -logits.shape[-1] % WIDTH)).view(len(logits), -1, WIDTH)
    block, rest, total = _passed(weights.sum(-1, dtype=torch.float64), uniforms)
    within = weights.gather(1, block[:, None, None].expand(-1, 1, WIDTH))[:, 0].double()
    token = (block * WIDTH + _passed(within, rest)[0])[:, None]
    return token[:, 0], (logits.gather(-1, token) - largest)[:, 0] - total.log().float()


def _passed(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """weights[rows, K], share[rows] -> (where their running sum passes that share of their total, what share of that
    weight lies below it, the total), [rows] each. A weight of 0 is never where."""
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum(share[:, None] * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(sums, target, right=True)
    weight = weights.gather(-1, place)
    below = sums.gather(-1, place) - weight
    return place[:, 0], ((target - below) / weight).clamp(0, 1)[:, 0], total[:, 0]


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """The distribution of the likeliest tokens that together reach top_p."""
    ordered, order = log_probs.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return ordered.log_softmax(-1).gather(-1, order.argsort(-1))


def _uniforms(seed: int, place: int, count: int) -> Tensor:
    """Of one answer, float64 [count]."""
    generator = torch.Generator().manual_seed((seed + place * 7919) % 2**63)
    return torch.rand(count, generator=generator, dtype=torch.float64)
