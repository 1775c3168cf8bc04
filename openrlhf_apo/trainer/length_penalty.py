"""Rewards that answers lose for their length: OpenRLHF's two penalties, on one sample at a time."""

from dataclasses import dataclass

from openrlhf_apo.trainer.samples import Sample


@dataclass(frozen=True)
class LengthPenalty:
    """The reward that training sees.

    overlong_buffer: the last tokens before max_new_tokens, over which a penalty grows from 0 to overlong_factor (DAPO,
    arXiv 2503.14476, Eq. 13); None for no penalty. stop_properly: truncated answers have their reward multiplied by
    it, or, when it is negative, replaced by it; None for no change.
    """

    max_new_tokens: int = 0
    overlong_buffer: float | None = None
    overlong_factor: float = 1.0
    stop_properly: float | None = None

    def __call__(self, sample: Sample) -> float:
        reward = sample.reward
        if self.overlong_buffer is not None:
            exceeded = sample.length - (self.max_new_tokens - self.overlong_buffer)
            reward -= min(max(exceeded / self.overlong_buffer, 0.0), 1.0) * self.overlong_factor
        if self.stop_properly is not None and sample.truncated:
            reward = self.stop_properly if self.stop_properly < 0 else reward * self.stop_properly
        return reward
