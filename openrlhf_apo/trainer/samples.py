"""What a rollout is made of: prompts, samples, and the whole groups that every group objective needs."""

from dataclasses import asdict, dataclass, field
from itertools import compress

from openrlhf_apo.errors import GroupError


@dataclass(frozen=True)
class Prompt:
    """One prompt drawn from the data set. `group_id` numbers the draws of a run: the same prompt drawn again gets
    another one."""

    group_id: int
    text: str
    label: object  # as the data set has it: a string, number, list or dict; "" where there is none
    datasource: str
    solution: str = ""  # a reference solution, where guidance asks for one


@dataclass
class Sample:
    """One completion of one prompt, or one conversation that began with it. Log-probs are natural logarithms.

    A conversation's response are the policy's turns and the feedback between them. `own` tells which of its tokens are
    the policy's: only these are trained, and only these count as its length.
    """

    group_id: int
    prompt: str
    label: object
    datasource: str
    prompt_ids: list[int]
    response_ids: list[int]
    response: str
    rollout_log_probs: list[float]  # of each response token, as the engine sampled it; 0 for feedback
    truncated: bool  # stopped by the length limit
    # None only until the Scorer has set it; the samples it returns have one, and nothing else looks at theirs.
    reward: float = None  # type: ignore[assignment]
    score: float | None = None  # what dynamic filtering and evaluations look at, where it is not the reward
    extra: dict[str, float] = field(default_factory=dict)  # `extra_logs` of the reward function, for the metrics
    stale: bool = False  # sampled by the policy of an earlier rollout than the one that trains on it
    shown: str = ""  # of a guided one: the part of the reference solution behind the prompt, before the response
    own: list[bool] | None = None  # whether the policy chose each response token; None: all of them

    @property
    def score_or_reward(self) -> float:
        return self.reward if self.score is None else self.score

    @property
    def own_ids(self) -> list[int]:
        """The response tokens that the policy chose."""
        return self._own(self.response_ids)

    @property
    def own_log_probs(self) -> list[float]:
        """Theirs, as the engine sampled them."""
        return self._own(self.rollout_log_probs)

    @property
    def length(self) -> int:
        """How many they are."""
        return len(self.response_ids) if self.own is None else sum(self.own)

    @property
    def total_length(self) -> int:
        """Tokens that go through the model."""
        return len(self.prompt_ids) + len(self.response_ids)

    def _own(self, values: list) -> list:
        return values if self.own is None else list(compress(values, self.own))

    def to_dict(self) -> dict:
        return asdict(self)


def whole_groups(samples: list[Sample], group_size: int) -> list[list[Sample]]:
    """The samples by group, in order of first appearance.

    Raises GroupError naming the prompt when a group has not exactly `group_size` samples or mixes prompts.
    """
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    for group_id, group in groups.items():
        head = group[0].prompt[:80]
        if len(group) != group_size:
            raise GroupError(f"group {group_id} has {len(group)} of {group_size} samples (prompt {head!r})")
        if any(sample.prompt != group[0].prompt for sample in group):
            other = next(sample.prompt for sample in group if sample.prompt != group[0].prompt)
            raise GroupError(f"group {group_id} mixes prompts {head!r} and {other[:80]!r}")
        if not all(sample.length for sample in group):
            raise GroupError(f"group {group_id} has an empty response (prompt {head!r})")
    return list(groups.values())


def by_group(samples: list[Sample]) -> list[list[Sample]]:
    """The samples of each group, in their order, whole or not."""
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    return list(groups.values())


def split_into_steps(groups: list[list[Sample]], groups_per_step: int) -> list[list[list[Sample]]]:
    """Whole groups per optimizer step, in order; the last step is short when the groups do not fill it."""
    return [groups[start : start + groups_per_step] for start in range(0, len(groups), groups_per_step)]
