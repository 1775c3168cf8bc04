"""Which rank computes which sample of a step, in which micro-batch.

The objective is a sum over samples, so this changes a step by rounding only: float32 sums in another order, and, where
gradients are added up in bf16 (ZeRO-2), what docs/gpu.md measures.
"""

from dataclasses import dataclass

from openrlhf_apo.objectives import Terms


@dataclass(frozen=True)
class MicroBatchLimit:
    """What goes through the model at once: `samples` samples, or where that is None as many as have `tokens` tokens,
    with their padding unless they are `packed`. A sample with more tokens goes alone."""

    samples: int | None = None
    tokens: int = 16192
    packed: bool = False

    def allows(self, lengths: list[int]) -> bool:
        """lengths: tokens of each sample of a micro-batch."""
        if self.samples is not None:
            return len(lengths) <= self.samples
        return (sum(lengths) if self.packed else len(lengths) * max(lengths)) <= self.tokens


@dataclass(frozen=True)
class Layout:
    """micro_batches[rank][micro_batch] = indices into the step's N samples.

    Every rank has equally many micro-batches, because forward and backward communicate under ZeRO. Where the samples
    do not divide, a rank repeats its last one as a ghost: `is_ghost[rank][k]` tells for its k-th sample.
    """

    micro_batches: list[list[list[int]]]
    is_ghost: list[list[bool]]

    def flat(self, rank: int) -> list[int]:
        return [index for micro_batch in self.micro_batches[rank] for index in micro_batch]

    def share(self, terms: Terms, rank: int) -> Terms:
        """The rank's terms, in its own order; ghosts have 0 everywhere."""
        return terms.take(self.flat(rank), [not ghost for ghost in self.is_ghost[rank]])

    def merge(self, per_rank: list[list], num_samples: int) -> list:
        """One value per sample of the step, from each rank's values in its own order."""
        merged: list = [0.0] * num_samples
        for rank, values in enumerate(per_rank):
            for i, ghost, value in zip(self.flat(rank), self.is_ghost[rank], values, strict=True):
                if not ghost:
                    merged[i] = value
        return merged


def make_layout(lengths: list[int], num_ranks: int, limit: MicroBatchLimit) -> Layout:
    """Deal the samples to ranks by length, longest first and back and forth, so that ranks carry equal loads and a
    micro-batch holds similar lengths. lengths: tokens of each sample."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for position, index in enumerate(by_length):
        lap, offset = divmod(position, num_ranks)
        ranks[offset if lap % 2 == 0 else num_ranks - 1 - offset].append(index)
    per_rank = max(len(rank) for rank in ranks)
    micro_batches, is_ghost = [], []
    for rank in ranks:
        ghosts = per_rank - len(rank)
        indices = rank + [rank[-1] if rank else by_length[-1]] * ghosts
        micro_batches.append(_cut(indices, lengths, limit))
        is_ghost.append([False] * len(rank) + [True] * ghosts)
    count = max(len(rank) for rank in micro_batches)
    return Layout([_split(rank, lengths, count) for rank in micro_batches], is_ghost)


def _cut(indices: list[int], lengths: list[int], limit: MicroBatchLimit) -> list[list[int]]:
    """Each micro-batch as many of the `indices`, in order, as fit."""
    micro_batches: list[list[int]] = [[]]
    for index in indices:
        if micro_batches[-1] and not limit.allows([lengths[i] for i in (*micro_batches[-1], index)]):
            micro_batches.append([])
        micro_batches[-1].append(index)
    return micro_batches


def _split(micro_batches: list[list[int]], lengths: list[int], count: int) -> list[list[int]]:
    """`count` micro-batches, by halving the one with the most tokens as often as it takes."""
    micro_batches = list(micro_batches)
    while len(micro_batches) < count:
        splittable = [k for k, batch in enumerate(micro_batches) if len(batch) > 1]
        k = max(splittable, key=lambda k: sum(lengths[i] for i in micro_batches[k]))
        batch = micro_batches[k]
        micro_batches[k : k + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return micro_batches
