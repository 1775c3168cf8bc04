"""What the trainer needs from a policy and an engine, whatever runs them.

The trainer never sees Ray, DeepSpeed or vLLM: it calls these methods. `ray_policy.py` and `ray_engine.py` implement
them with Ray actors; another implementation needs no other trainer. N is the number of samples of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from openrlhf_apo.trainer.samples import Prompt, Sample
from openrlhf_apo.trainer.step import StepReport, StepTerms


class PolicyHandle(Protocol):
    """The trained model, sharded however it likes. A step is a list of samples, numbered within its rollout."""

    def load_steps(self, steps: list[list[Sample]]) -> None:
        """Hand over a rollout: the samples of each optimizer step. Replaces the rollout before."""

    def log_prob_sums(self, step: int, weights: Literal["policy", "anchor"] = "policy") -> Tensor:
        """Σ_t log π(y_t) of the step's samples under the current or the anchor weights. -> [N] float64, nats."""

    def record_old(self, step: int, entropy: bool = False) -> Tensor | None:
        """Keep the log-probs of the step's tokens under the current weights as those of π_old, for its later `apply`.
        With `entropy`, -> [N] float64, mean over tokens of the entropy of π_old, nats."""

    def log_ratios(self, step: int) -> list[Tensor]:
        """log π_θ − log π_old of each token, one float64 tensor per sample. π_old of a step that was not recorded is
        the current policy."""

    def apply(self, step: int, terms: StepTerms) -> StepReport:
        """One optimizer step on the sum that `terms` describes. π_old of a step that was not recorded is the policy
        before this step, and is recorded now."""

    def update_anchor(self, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy, in float32. 0 copies the policy."""

    def save_checkpoint(self, tag: str, trainer_state: dict) -> None:
        """Weights, optimizer, scheduler, anchor and the trainer's state (JSON-able), as checkpoint `tag`."""

    def trainer_state(self) -> dict:
        """The trainer's state of the checkpoint loaded at start-up; empty when none was."""

    def save_model(self) -> None:
        """Write a Hugging Face folder (weights, config, tokenizer) to --ckpt.output_dir."""


@dataclass(frozen=True)
class SamplingSettings:
    samples_per_prompt: int
    temperature: float
    top_p: float
    max_new_tokens: int | None  # None: what is left of max_len
    max_len: int  # prompt + response, tokens
    seed: int


class EngineHandle(Protocol):
    """What samples completions."""

    def generate(
        self, prompts: list[Prompt], settings: SamplingSettings, prefix: Callable[[list[int]], list[int]] | None = None
    ) -> list[Sample]:
        """`samples_per_prompt` unscored samples of each prompt, in prompt order. Equal seeds give equal samples.

        prefix: of the tokens of a prompt's reference solution, those that follow the prompt and are gone on from;
        they count as the sample's prompt.
        """

    def sync_weights(self) -> None:
        """Give the engine the policy's current weights."""

    def check_weights(self) -> None:
        """Raise RuntimeError naming a tensor that differs between policy and engine."""
