"""What the trainer needs from a policy and an engine, whatever runs them.

The trainer never sees Ray, DeepSpeed or vLLM: it calls these methods. `cluster/policy.py` and `cluster/engine.py`
implement them with Ray actors; another implementation needs no other trainer. N is the number of samples of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from openrlhf_apo.objectives import Terms
from openrlhf_apo.trainer.samples import Prompt, Sample
from openrlhf_apo.trainer.step import Report

if TYPE_CHECKING:  # which reads the settings below
    from openrlhf_apo.trainer.completions import Completion, Request

EMA_FOLDER = "ema"  # in --ckpt.output_dir: the moving average of the policy, as a model

# Whose log-probs are those of π_old, the policy that sampled a rollout: the current weights', before the first update;
# with asynchronous training the anchor's, which are kept for it, or those that the engine reported.
Behavior = Literal["policy", "anchor", "engine"]
Pending = Callable[[], list[Sample]]  # waits for samples that an engine has begun


class PolicyHandle(Protocol):
    """The trained model, sharded however it likes. A step is a list of samples, numbered within its rollout."""

    def load_steps(self, steps: list[list[Sample]]) -> None:
        """Hand over a rollout: the samples of each optimizer step. Replaces the rollout before."""

    def log_prob_sums(self, step: int, weights: Behavior = "policy", keep_graph: bool = False) -> list[float]:
        """Σ_t log π(y_t) of the step's samples under the current or the anchor weights, or as the engine reported it.
        -> [N], float64, nats.

        keep_graph: of the policy's forward, for the `apply` of this step that comes next, which then goes without a
        second one as far as memory allows.
        """

    def record_old(self, step: int, entropy: bool = False, keep_graph: bool = False) -> list[float] | None:
        """Keep the log-probs of the step's tokens under π_old, which is the policy's Behavior, for its later `apply`.
        With `entropy`, -> [N], float64, mean over tokens of the entropy of π_old, nats. keep_graph: as above, where
        π_old is the current policy.

        Before the rollout's first `apply`. Without `entropy`, nothing is computed where `log_prob_sums` of π_old has
        kept them already."""

    def log_ratios(self, step: int) -> list[list[float]]:
        """log π_θ − log π_old of each token of each of the N samples, before the `apply` of the step. For a step that
        was not recorded, π_old is the current policy and all are 0."""

    def apply(self, step: int, terms: Terms) -> Report:
        """One optimizer step on the sum that `terms` describes. π_old of a step that was not recorded is the policy
        before this step, and is recorded now."""

    def update_anchor(self, beta: float) -> None:
        """anchor ← beta · anchor + (1 − beta) · policy, in float32. 0 copies the policy."""

    def save_checkpoint(self, tag: str, trainer_state: dict) -> None:
        """Weights, optimizer, scheduler, anchor and the trainer's state (JSON-able), into the folder
        `--ckpt.path/_actor/tag`."""

    def trainer_state(self) -> dict:
        """The trainer's state of the checkpoint loaded at start-up; empty when none was."""

    def save_model(self) -> None:
        """Write a Hugging Face folder (weights, config, tokenizer) to --ckpt.output_dir; and, where an average of the
        policy is kept, another into its EMA_FOLDER."""


@dataclass(frozen=True)
class SamplingSettings:
    samples_per_prompt: int
    temperature: float
    top_p: float
    max_new_tokens: int | None  # None: what is left of max_len
    max_len: int  # prompt + response, tokens
    seed: int

    @property
    def prompt_limit(self) -> int:
        """Tokens that a prompt may have."""
        return self.max_len - (self.max_new_tokens or 1)


class EngineHandle(Protocol):
    """What samples completions. own_weights: whether they are another copy than the policy's, which stays as it is
    until the next sync."""

    @property
    def own_weights(self) -> bool: ...

    @property
    def restarts(self) -> int:
        """How many engines died and were replaced so far."""

    def generate(
        self, prompts: list[Prompt], settings: SamplingSettings, prefix: Callable[[list[int]], list[int]] | None = None
    ) -> list[Sample]:
        """`samples_per_prompt` unscored samples of each prompt, in prompt order. Equal seeds give equal samples.

        prefix: from the tokens of a prompt's reference solution to those that shall follow the prompt. The policy
        goes on from them, and they count as part of the prompt.
        """

    def begin(
        self, prompts: list[Prompt], settings: SamplingSettings, prefix: Callable[[list[int]], list[int]] | None = None
    ) -> Pending:
        """The same, without waiting where there is something to wait for. No sync before the samples are there."""

    def complete(self, requests: "list[Request]") -> "list[Completion]":
        """One completion of each. Equal requests get equal ones, whatever is asked for beside them, up to rounding."""

    def rest(self) -> None:
        """Before the policy is trained, where no `generate` has come since the last `complete` or sync."""

    def sync_weights(self) -> None:
        """Give the engine the policy's current weights."""

    def check_weights(self) -> None:
        """Raise RunError naming a tensor that differs between policy and engine."""
