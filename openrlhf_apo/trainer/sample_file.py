"""samples.jsonl: some of what the policy answered, to be read by a person (cli/samples.py)."""

import json
import logging
from collections.abc import Callable

from openrlhf_apo.trainer.metrics import MetricsFile
from openrlhf_apo.trainer.samples import Sample

logger = logging.getLogger(__name__)

NAME = "samples.jsonl"
EVERY = 10  # rollouts
MAX_CHARACTERS = 4000  # of a text; the middle of a longer one is left out
MAX_BYTES = 4 << 20  # of the file


class SampleFile:
    """The first group of the first rollout, of the 11th, and so on, one group a line, until the file is full.

    A line: `step` (the rollout), `prompt`, `label`, and by answer `responses` (in ⟦ ⟧ what is not the policy's),
    `rewards`, `truncated` (0 or 1) and, where the loss has them, `advantages`, as its first optimizer step saw them.
    """

    def __init__(self, directory: str, resume_step: int | None):
        self.file = MetricsFile(f"{directory}/{NAME}", resume_step, every_step=False)
        self.full = False

    def write(self, rollout: int, group: list[Sample], advantages: list[float] | None) -> None:
        if rollout % EVERY != 1 or self.full:
            return
        row = group_row(rollout, group, _short)
        self.file.write(row | ({} if advantages is None else {"advantages": advantages}))
        if self.file.path.stat().st_size > MAX_BYTES:
            self.full = True
            logger.info("%s is full (%d MiB): no more samples are kept", self.file.path, MAX_BYTES >> 20)


def group_row(rollout: int, group: list[Sample], shorten: Callable[[str], str] = str) -> dict:
    """A line, without advantages."""
    label = group[0].label
    return {
        "step": rollout,
        "prompt": shorten(group[0].prompt),
        "label": shorten(label if isinstance(label, str) else json.dumps(label, default=str)),
        "responses": [shorten(f"⟦{s.shown}⟧{s.response}" if s.shown else s.response) for s in group],
        "rewards": [sample.reward for sample in group],
        "truncated": [int(sample.truncated) for sample in group],
    }


def _short(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
