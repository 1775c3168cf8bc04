"""Weights in flat buffers of bounded size: one hand-over for many of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_apo import cpu

BUCKET_BYTES = 256 * 2**20
CPU_BUCKET_BYTES = 24 * 2**20  # malloc maps larger blocks anew each time: 93 MB took 180 ms in one, 92 ms in four
ALIGNMENT = 16  # bytes; a view in another dtype must start at a multiple of its item size


@dataclass(frozen=True)
class Slot:
    """Where a weight lies in a buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes

    def of(self, buffer: Tensor) -> Tensor:
        """The weight, a view of the buffer uint8[bytes]."""
        end = self.start + torch.Size(self.shape).numel() * self.dtype.itemsize
        return buffer[self.start : end].view(self.dtype).view(self.shape)


def bucket_bytes() -> int:
    return BUCKET_BYTES if cpu.has_cuda() else CPU_BUCKET_BYTES


def bounded_runs(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Consecutive indices whose sizes add up to no more than `limit`; one that is larger is alone."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            yield range(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield range(start, len(sizes))


def pack(weights: Sequence[tuple[str, Tensor]], device: torch.device | str) -> tuple[list[Slot], Tensor]:
    """Where each weight lies, and the buffer uint8[bytes] on `device`."""
    slots, end = [], 0
    for name, weight in weights:
        slots.append(Slot(name, weight.dtype, tuple(weight.shape), end))
        end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, device=device)
    for slot, (_, weight) in zip(slots, weights, strict=True):
        slot.of(buffer).copy_(weight)
    return slots, buffer


def unpack(slots: Sequence[Slot], buffer: Tensor) -> list[tuple[str, Tensor]]:
    """(name, view of the buffer) of each weight."""
    return [(slot.name, slot.of(buffer)) for slot in slots]
