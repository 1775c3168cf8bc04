"""The trainer: generate, score, update, sync, evaluate, save; one line of metrics.jsonl per turn.

It knows handles only (handles.py), so whatever implements them is trained by this loop.
"""

import logging
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tqdm import tqdm

from openrlhf_apo.objectives import Guidance
from openrlhf_apo.trainer.handles import EngineHandle, PolicyHandle, SamplingSettings
from openrlhf_apo.trainer.metrics import MetricsFile
from openrlhf_apo.trainer.prompts import PromptStream
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Prompt, Sample, whole_groups
from openrlhf_apo.trainer.scoring import Scorer

logger = logging.getLogger(__name__)


class Clock:
    """Seconds by phase since the last `lap`."""

    def __init__(self):
        self.phases: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        times = {f"time/{phase}": seconds for phase, seconds in self.phases.items()} | {"time/step": now - self.start}
        self.phases, self.start = {}, now
        return times


class Evaluation:
    """Held-out prompts: `eval/pass1` is the mean reward, `eval/pass<k>` the mean of the best of k."""

    def __init__(self, prompts: list[Prompt], settings: SamplingSettings, every: float):
        self.prompts, self.settings, self.every = prompts, settings, every

    def run(self, engine: EngineHandle, scorer: Scorer) -> dict[str, float]:
        samples = scorer.score(engine.generate(self.prompts, self.settings))
        groups = whole_groups(samples, self.settings.samples_per_prompt)
        rewards = [[sample.reward for sample in group] for group in groups]
        metrics = {"eval/pass1": statistics.fmean(statistics.fmean(group) for group in rewards)}
        if self.settings.samples_per_prompt > 1:
            metrics[f"eval/pass{self.settings.samples_per_prompt}"] = statistics.fmean(map(max, rewards))
        sources = {group[0].datasource for group in groups}
        if len(sources) > 1:
            for source in sorted(sources):
                metrics[f"eval/{source}/pass1"] = statistics.fmean(
                    sample.reward for group in groups for sample in group if sample.datasource == source
                )
        metrics["eval/response_length"] = statistics.fmean(len(s.response_ids) for s in samples)
        metrics["eval/truncated_fraction"] = statistics.fmean(s.truncated for s in samples)
        return metrics


@dataclass(frozen=True)
class GroupFilter:
    """Which groups a rollout keeps (DAPO's dynamic sampling): those with unequal rewards, whose mean is inside
    `mean_range` where one is given."""

    mean_range: tuple[float, float] | None = None

    def __call__(self, group: list[Sample]) -> bool:
        rewards = [sample.reward for sample in group]
        if min(rewards) == max(rewards):
            return False
        return self.mean_range is None or self.mean_range[0] < statistics.fmean(rewards) < self.mean_range[1]


class EngineRollouts:
    """Rollouts sampled from the engine and scored; kept on disk when `save_to` is given.

    With a `keep` filter, groups that fail it are replaced by those of further prompts, sampled in up to
    `max_generations` batches; a rollout may stay short of groups then. With `guidance`, a share of each group starts
    from the beginning of the reference solution.
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
    ):
        self.prompts, self.batch_size, self.settings, self.engine = prompts, batch_size, settings, engine
        self.scorer, self.save_to, self.guidance = scorer, save_to, guidance
        self.keep, self.max_generations = keep, max_generations if keep else 1
        self.metrics: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.prompts) // self.batch_size

    def rollout(self, step: int, clock: Clock) -> list[Sample]:
        kept: list[list[Sample]] = []
        generations = sampled = 0
        while len(kept) < self.batch_size and generations < self.max_generations:
            with clock("generate"):
                samples = self._generate(self.batch_size)
            with clock("reward"):
                groups = whole_groups(self.scorer.score(samples), self.settings.samples_per_prompt)
            generations += 1
            sampled += len(groups)
            kept += [group for group in groups if self.keep is None or self.keep(group)]
        self.metrics = {}
        if self.keep is not None:
            self.metrics = {"generations": generations, "filtered_groups": sampled - len(kept)}
            if len(kept) < self.batch_size:
                logger.warning(
                    "step %d: %d of %d groups are left after %d batches; the others have equal rewards (or a mean "
                    "outside --algo.dynamic_filtering_range)",
                    *(step, len(kept), self.batch_size, generations),
                )
        result = [sample for group in kept[: self.batch_size] for sample in group]
        if self.guidance is not None and result:
            self.metrics["guidance_tokens"] = self.guidance.tokens
            self.guidance.step(statistics.fmean(sample.reward for sample in result))
        if self.save_to is not None:
            self.save_to.write(step, result)
        return result

    def _generate(self, count: int) -> list[Sample]:
        prompts = self.prompts.draw(count)
        if self.guidance is None:
            return self.engine.generate(prompts, self.settings)
        guided = self.guidance.guided(self.settings.samples_per_prompt)
        free = replace(self.settings, samples_per_prompt=self.settings.samples_per_prompt - guided)
        samples = self.engine.generate(prompts, free)
        samples += self.engine.generate(
            prompts, replace(self.settings, samples_per_prompt=guided), self.guidance.prefix
        )
        return sorted(samples, key=lambda sample: sample.group_id)


class FileRollouts:
    """Rollouts that were saved by an earlier run; no engine, no reward."""

    metrics: dict[str, float] = {}

    def __init__(self, files: RolloutFiles):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def rollout(self, step: int, clock: Clock) -> list[Sample]:
        with clock("generate"):
            return self.files.read(step)


class Trainer:
    """Owns the order of things and the state that a resumed run needs."""

    def __init__(
        self,
        *,
        policy: PolicyHandle,
        engine: EngineHandle | None,
        rollouts: EngineRollouts | FileRollouts,
        update: Callable[[list[list[Sample]], int], dict],
        group_size: int,
        scorer: Scorer,
        evaluation: Evaluation | None,
        metrics: MetricsFile,
        trackers: list,
        track_every: int,
        save_every: float,
        state: dict[str, object],
        start_step: int,
    ):
        """update(groups, rollout) trains on whole groups and returns metrics. `state` holds what is saved beside the
        weights: objects with state_dict(). `start_step` rollout steps are already done. `trackers` are OpenRLHF's
        loggers, told every `track_every` steps; `metrics` every step."""
        self.policy, self.engine, self.rollouts, self.update = policy, engine, rollouts, update
        self.group_size, self.scorer, self.evaluation = group_size, scorer, evaluation
        self.metrics, self.trackers, self.track_every = metrics, trackers, track_every
        self.save_every, self.state = save_every, state
        self.start_step = start_step

    def fit(self) -> None:
        if self.start_step < len(self.rollouts):
            self._train()
        else:
            logger.info("nothing left to train: all %d rollout steps are done", len(self.rollouts))
        self.policy.save_model()

    def _train(self) -> None:
        clock = Clock()
        if self.engine:
            self.engine.sync_weights()
            self.engine.check_weights()
        if self.evaluation and self.start_step == 0:
            self._log({"step": 0} | self._evaluate(clock) | clock.lap())
        clock.lap()
        progress = tqdm(range(self.start_step, len(self.rollouts)), initial=self.start_step, total=len(self.rollouts))
        for done in progress:
            step = done + 1
            self._log(self._turn(step, clock), progress)
            # After its line is on disk, so that a checkpoint never knows more than metrics.jsonl.
            if step % self.save_every == 0:
                with clock("save"):
                    self.policy.save_checkpoint(f"global_step{step}", self._state(step))

    def _turn(self, step: int, clock: Clock) -> dict:
        samples = self.rollouts.rollout(step, clock)
        groups = whole_groups(samples, self.group_size)
        row = {"step": step} | self.scorer.metrics() | self.rollouts.metrics
        if groups:
            row |= _sample_metrics(samples)
            with clock("update"):
                row |= self.update(groups, step - 1)
            if self.engine:
                with clock("sync"):
                    self.engine.sync_weights()
        else:
            logger.warning("step %d: every group was dropped, nothing to train on", step)
        if self.evaluation and (step % self.evaluation.every == 0 or step == len(self.rollouts)):
            row |= self._evaluate(clock)
        times = clock.lap()
        if groups:
            tokens = sum(len(sample.response_ids) for sample in samples)
            times["tokens_per_s"] = tokens / times["time/step"]
        return row | times

    def _evaluate(self, clock: Clock) -> dict[str, float]:
        with clock("eval"):
            return self.evaluation.run(self.engine, self.scorer)

    def _state(self, step: int) -> dict:
        return {"step": step} | {name: part.state_dict() for name, part in self.state.items()}

    def _log(self, row: dict, progress: tqdm | None = None) -> None:
        self.metrics.write(row)
        step = row["step"]
        evaluated = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and not k.startswith("eval/")}
        for tracker in self.trackers:
            if step > 0 and step % self.track_every == 0:
                tracker.log_train(step, scalars)
            if evaluated:
                tracker.log_eval(step, evaluated)
        if progress is not None:
            shown = {"reward": row.get("reward_mean"), "α": row.get("alpha"), "pass@1": row.get("eval/pass1")}
            progress.set_postfix({key: f"{value:.3f}" for key, value in shown.items() if value is not None})


def _sample_metrics(samples: list[Sample]) -> dict[str, float]:
    rewards = [sample.reward for sample in samples]
    return {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "response_length": statistics.fmean(len(sample.response_ids) for sample in samples),
        "truncated_fraction": statistics.fmean(sample.truncated for sample in samples),
        "token_entropy": -statistics.fmean(log_prob for sample in samples for log_prob in sample.rollout_log_probs),
    }


def evaluation_prompts(rows: list[tuple]) -> list[Prompt]:
    """Held-out prompts with group ids of their own, below those of the training stream."""
    return [Prompt(-1 - i, *row) for i, row in enumerate(rows)]


def evaluation_settings(training: SamplingSettings, samples_per_prompt: int, temperature: float) -> SamplingSettings:
    return replace(training, samples_per_prompt=samples_per_prompt, temperature=temperature, top_p=1.0)
