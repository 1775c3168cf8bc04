"""A run by value: everything that the command line decides, as built parts. options/plan.py makes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from openrlhf_apo.objectives import Guidance, RolloutCorrection
from openrlhf_apo.trainer.group_objective import GroupPlan
from openrlhf_apo.trainer.handles import Behavior, SamplingSettings
from openrlhf_apo.trainer.health import Health
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.length_penalty import LengthPenalty
from openrlhf_apo.trainer.placement import Placement
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.rollouts import GroupFilter
from openrlhf_apo.trainer.token_objective import TokenPlan


@dataclass(frozen=True)
class Schedule:
    """How many of what. A rollout is `prompts_per_rollout` groups of `group_size` samples."""

    prompts_per_rollout: int
    group_size: int  # P
    groups_per_step: int  # prompts of an optimizer step
    epochs: int  # over a rollout's samples
    episodes: int  # over the prompts
    seed: int

    def optimizer_steps(self, prompts_of_rollouts: list[int]) -> int:
        """Of a run with rollouts of so many prompts."""
        return self.epochs * sum(-(-prompts // self.groups_per_step) for prompts in prompts_of_rollouts)


@dataclass(frozen=True)
class DataPlan:
    prompts: str | None  # comma-separated names; None with saved rollouts
    probabilities: str | None
    split: str
    evaluation: str | None
    evaluation_split: str
    label_key: str | None
    label_optional: bool  # a data set without that column has no labels


@dataclass(frozen=True)
class RewardPart:
    """One of the rewards that are added up. urls: None for math_verify, else a .py file or HTTP servers. timeout:
    seconds of a call. In place of these, function: a Python function of prompt, response and label; or model: the
    folder or name of a reward model; or agent: a .py file whose conversations earn their own, the only reward then."""

    name: str
    urls: list[str] | None
    timeout: float
    weight: float = 1.0
    function: Callable[[str, str, Any], float] | None = None
    model: str | None = None
    agent: str | None = None

    @property
    def is_file(self) -> bool:
        return self.urls is not None and self.urls[0].endswith(".py")

    @property
    def is_math_verify(self) -> bool:
        return self.urls is None and self.function is None and self.model is None and self.agent is None


@dataclass(frozen=True)
class RewardPlan:
    """isolate: files run in processes of their own."""

    parts: tuple[RewardPart, ...]
    max_failures: int
    isolate: bool = False

    @property
    def model(self) -> str | None:
        """The reward model, where one of the parts is one."""
        return next((part.model for part in self.parts if part.model is not None), None)


@dataclass(frozen=True)
class EvaluationPlan:
    sampling: SamplingSettings
    every: int | None  # rollouts; None: never
    ends: bool  # also before the first and after the last rollout


@dataclass(frozen=True)
class OutputPlan:
    directory: str  # metrics.jsonl and the trained model
    saves_adapter: bool  # and not the whole model
    checkpoints: str
    resumable: bool  # checkpoints are written whole, and not only as a Hugging Face folder
    max_checkpoints: int
    max_checkpoints_gb: float
    save_every: int | None  # rollouts; None: never
    best_key: str
    track_every: int
    resume: bool
    allowed_changes: tuple[str, ...]  # flags whose value may differ from the checkpoint's


@dataclass(frozen=True)
class RunPlan:
    """objective: None for `--loss openrlhf`, whose step is OpenRLHF's own. saved_rollouts: read instead of sampled."""

    loss: str
    objective: GroupPlan | TokenPlan | None
    regularizer: Regularizer
    length_penalty: LengthPenalty
    sampling: SamplingSettings
    schedule: Schedule
    data: DataPlan
    reward: RewardPlan
    evaluation: EvaluationPlan | None
    output: OutputPlan
    micro_batches: MicroBatchLimit
    health: Health
    placement: Placement  # of a run on Ray
    manifest: dict  # {flag: value} of what decides the optimizer steps, but the data
    correction: RolloutCorrection | None = None  # of the gap between engine and policy
    ema: float | None = None  # share that the average of the policy keeps of itself at each step; None: no average
    guidance: Guidance | None = None
    group_filter: GroupFilter | None = None
    max_generations: int = 1
    generate_batch: int | None = None  # prompts that go to the engine at once; None: those of a rollout
    save_rollouts: str | None = None
    saved_rollouts: str | None = None
    asynchronous: bool = False  # a rollout is sampled while the one before trains
    old_log_probs: Literal["weights", "engine"] = "weights"  # of the policy that sampled it
    check_every_sync: bool = False
    timeout: float = 3600.0  # seconds any one wait may take
    max_restarts: int = 0  # of the whole run, from its last checkpoint
    restarts: int = 0  # so far
    max_engine_restarts: int = 0
    record: dict = field(default_factory=dict)  # of the command line, for run.json (options/record.py)

    @property
    def behavior(self) -> Behavior:
        """Whose log-probs are those of π_old. The one second set of weights may be that of another anchor."""
        if not self.asynchronous:
            return "policy"
        taken = isinstance(self.objective, GroupPlan) and self.objective.anchor.has_weights
        return "engine" if taken or self.old_log_probs == "engine" else "anchor"

    @property
    def anchor_weights(self) -> bool:
        """Whether ranks keep the weights of an anchor beside the policy's."""
        own = isinstance(self.objective, GroupPlan) and self.objective.anchor.has_weights
        return own or self.behavior == "anchor"

    def summary(self, optimizer_steps: int) -> str:
        """One line for the start of a run."""
        schedule = self.schedule
        return (
            f"--loss {self.loss}: rollouts of {schedule.prompts_per_rollout} prompts x {schedule.group_size} answers, "
            f"{optimizer_steps} optimizer steps in all; output in {self.output.directory}"
        )

    @property
    def reference_anchor(self) -> bool:
        return isinstance(self.objective, GroupPlan) and self.objective.anchor.mode == "reference"
