"""Where the samples of a rollout come from: sampled from the engine and scored, or read from files."""

import logging
import statistics
from dataclasses import dataclass, replace
from typing import Protocol

from openrlhf_apo.objectives import Guidance
from openrlhf_apo.trainer.clock import Clock
from openrlhf_apo.trainer.handles import EngineHandle, Pending, SamplingSettings
from openrlhf_apo.trainer.prompts import PromptStream
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample, whole_groups
from openrlhf_apo.trainer.scoring import Scorer

logger = logging.getLogger(__name__)


class Rollouts(Protocol):
    """A rollout is one turn of the trainer: samples, then optimizer steps on them. Rollouts are numbered from 1."""

    metrics: dict[str, float]  # of the last rollout

    def __len__(self) -> int:
        """How many rollouts there are; dynamic filtering may use up the prompts before."""

    @property
    def exhausted(self) -> bool:
        """Whether there is nothing left to sample from."""

    def sample(self, rollout: int, clock: Clock) -> list[Sample]:
        """Scored samples in whole groups: those that were begun and finished before, or made now."""

    def begin(self, rollout: int, clock: Clock) -> None:
        """Have the engine sample the next rollout, with the weights it has now."""

    def finish(self, rollout: int, clock: Clock) -> None:
        """Wait for what was begun, if anything was, and score it."""


@dataclass
class Begun:
    """A rollout that the engine is sampling. wanted: groups beside those of the surplus. left: prompts of the episode
    that were not drawn before. batch: its first one."""

    wanted: int
    left: int
    batch: Pending | None


@dataclass(frozen=True)
class GroupFilter:
    """Which groups a rollout keeps (DAPO's dynamic sampling): those with unequal rewards, whose mean score is inside
    `mean_range` where one is given."""

    mean_range: tuple[float, float] | None = None

    def __call__(self, group: list[Sample]) -> bool:
        rewards = [sample.reward for sample in group]
        if min(rewards) == max(rewards):
            return False
        mean = statistics.fmean(sample.score_or_reward for sample in group)
        return self.mean_range is None or self.mean_range[0] < mean < self.mean_range[1]


class EngineRollouts:
    """Rollouts sampled from the engine and scored; kept on disk when `save_to` is given.

    A rollout stays inside an episode, so that the last one of an episode may be short, as in OpenRLHF. Prompts go to
    the engine in batches of `generate_batch`, `batch_size` or more. With a `keep` filter, groups that fail it are
    replaced by those of further prompts of the episode, in up to `max_generations` batches; a rollout may stay short
    of groups then. With `guidance`, a share of each group starts from the beginning of the reference solution.

    Groups that a rollout has no room for are the surplus. The next rollouts of the episode begin with it, oldest
    first, and sample only what is missing. It is trained on as OpenRLHF does: as if the policy of that rollout had
    sampled it.
    """

    def __init__(
        self,
        prompts: PromptStream,
        batch_size: int,
        settings: SamplingSettings,
        engine: EngineHandle,
        scorer: Scorer,
        save_to: RolloutFiles | None = None,
        keep: GroupFilter | None = None,
        max_generations: int = 1,
        guidance: Guidance | None = None,
        generate_batch: int | None = None,
    ):
        self.prompts, self.batch_size, self.settings, self.engine = prompts, batch_size, settings, engine
        self.scorer, self.save_to, self.guidance = scorer, save_to, guidance
        self.keep, self.max_generations = keep, max_generations if keep else 1
        self.generate_batch = generate_batch or batch_size
        self.surplus: list[list[Sample]] = []
        self.begun: Begun | None = None
        self.ready: tuple[list[Sample], dict] | None = None  # the next rollout and its metrics
        self.metrics: dict[str, float] = {}

    def __len__(self) -> int:
        return -(-len(self.prompts.rows) // self.batch_size) * self.prompts.episodes

    @property
    def exhausted(self) -> bool:
        return self.prompts.exhausted and not self.surplus and self.ready is None

    def sample(self, rollout: int, clock: Clock) -> list[Sample]:
        if self.ready is None:
            self._begin(clock)
            self.finish(rollout, clock)
        assert self.ready is not None
        (samples, self.metrics), self.ready = self.ready, None
        return samples

    def begin(self, rollout: int, clock: Clock) -> None:
        self._begin(clock)
        if not self.engine.own_weights:  # any further batch is to come from the same weights
            self.finish(rollout, clock)

    def _begin(self, clock: Clock) -> None:
        # The surplus of an episode whose prompts are all drawn is used up before the next episode begins.
        left = 0 if self.surplus and self.prompts.at_start_of_episode else self.prompts.left_in_episode()
        stale = min(self.batch_size, len(self.surplus))
        wanted = min(self.batch_size, len(self.surplus) + left) - stale
        with clock("generate"):
            self.begun = Begun(wanted, left, self._batch() if wanted > 0 else None)

    def finish(self, rollout: int, clock: Clock) -> None:
        if self.begun is None:
            return
        wanted, left, batch = self.begun.wanted, self.begun.left, self.begun.batch
        stale = self.surplus[: self.batch_size]
        fresh: list[list[Sample]] = []
        generations = sampled = 0
        while batch is not None:
            with clock("generate"):
                samples = batch()
            with clock("reward"):
                groups = whole_groups(self.scorer.score(samples), self.settings.samples_per_prompt)
            left -= min(left, self.generate_batch)
            generations += 1
            sampled += len(groups)
            fresh += [group for group in groups if self.keep is None or self.keep(group)]
            more = len(fresh) < wanted and left > 0 and generations < self.max_generations
            with clock("generate"):
                batch = self._batch() if more else None
        if generations == 0:
            self.engine.rest()
        self.surplus = self.surplus[len(stale) :] + fresh[wanted:]
        for group in fresh[wanted:]:
            for sample in group:
                sample.stale = True
        metrics: dict[str, float] = {}
        if self.keep is not None or self.generate_batch > self.batch_size:
            metrics = {
                "generations": generations,
                "stale_groups": len(stale),
                "surplus_groups": len(self.surplus),
            }
        if self.keep is not None:
            metrics["filtered_groups"] = sampled - len(fresh)
            if len(fresh) < wanted:
                logger.warning(
                    "rollout %d: %d of %d groups are left after %d batches; the others have equal rewards (or a mean "
                    "outside --algo.dynamic_filtering_range)",
                    *(rollout, len(stale) + len(fresh), len(stale) + wanted, generations),
                )
        # Fresh groups first: the first optimizer step measures what engine and policy differ by, on them alone.
        fresh = fresh[:wanted]
        result = [sample for group in fresh + stale for sample in group]
        if self.guidance is not None and fresh:  # a stale group was guided by a length of before
            metrics["guidance_tokens"] = self.guidance.tokens
            self.guidance.step(statistics.fmean(sample.reward for group in fresh for sample in group))
        if self.save_to is not None:
            self.save_to.write(rollout, result)
        self.begun, self.ready = None, (result, metrics)

    def state_dict(self) -> dict:
        """Between two rollouts, when nothing is under way."""
        samples, metrics = self.ready or ([], {})
        return {
            "surplus": [[vars(sample) for sample in group] for group in self.surplus],
            "ready": self.ready and {"samples": [vars(sample) for sample in samples], "metrics": metrics},
        }

    def load_state_dict(self, state: dict) -> None:
        self.surplus = [[Sample(**sample) for sample in group] for group in state["surplus"]]
        ready = state["ready"]
        self.ready = ready and ([Sample(**sample) for sample in ready["samples"]], ready["metrics"])

    def _batch(self) -> Pending:
        """Begin a batch of prompts; its samples in whole groups."""
        prompts = self.prompts.draw(self.generate_batch)
        if self.guidance is None:
            return self.engine.begin(prompts, self.settings)
        guided, prefix = self.guidance.guided(self.settings.samples_per_prompt), self.guidance.prefix
        free = replace(self.settings, samples_per_prompt=self.settings.samples_per_prompt - guided)
        begun, others = self.engine.begin(prompts, free), replace(self.settings, samples_per_prompt=guided)

        def samples() -> list[Sample]:
            both = begun() + self.engine.generate(prompts, others, prefix)
            return sorted(both, key=lambda sample: sample.group_id)

        return samples


class FileRollouts:
    """Rollouts that were saved by an earlier run; no engine, no reward."""

    exhausted = False
    metrics: dict[str, float] = {}

    def __init__(self, files: RolloutFiles):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, rollout: int, clock: Clock) -> list[Sample]:
        with clock("generate"):
            return self.files.read(rollout)

    def begin(self, rollout: int, clock: Clock) -> None:
        """They are there."""

    def finish(self, rollout: int, clock: Clock) -> None:
        pass
