"""The trainer: sample, score, update, sync, evaluate, save; one line of metrics.jsonl per rollout.

With asynchronous training the next rollout is begun before the update and finished after it, before the sync: between
two rollouts nothing is under way, and what is there is in the checkpoint.

It knows handles only (handles.py), so whatever implements them is trained by this loop.
"""

import copy
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from openrlhf_apo.trainer.checkpoints import Checkpoints, Stateful
from openrlhf_apo.trainer.clock import Clock
from openrlhf_apo.trainer.evaluation import Evaluation
from openrlhf_apo.trainer.handles import EMA_FOLDER, EngineHandle, PolicyHandle
from openrlhf_apo.trainer.health import Health
from openrlhf_apo.trainer.live_view import LiveView
from openrlhf_apo.trainer.metrics import MetricsFile, read_metrics
from openrlhf_apo.trainer.rollouts import Rollouts
from openrlhf_apo.trainer.sample_file import SampleFile
from openrlhf_apo.trainer.samples import Sample, whole_groups
from openrlhf_apo.trainer.scoring import Scorer
from openrlhf_apo.trainer.stop import Stopped, StopSignals
from openrlhf_apo.trainer.summary import closing_lines

logger = logging.getLogger(__name__)

# Trains on the whole groups of a rollout, which is numbered from 0 here; returns metrics.
RolloutUpdate = Callable[[list[list[Sample]], int], dict]


@dataclass(kw_only=True)
class Trainer:
    """Owns the order of things and the state that a resumed run needs."""

    policy: PolicyHandle
    engine: EngineHandle | None
    rollouts: Rollouts
    update: RolloutUpdate
    group_size: int
    scorer: Scorer
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    metrics: MetricsFile
    samples: SampleFile
    health: Health
    write_card: Callable[[list[dict]], None]  # of the model, from the rows of metrics.jsonl
    trackers: list = field(default_factory=list)  # OpenRLHF's loggers
    track_every: int = 1  # rollouts
    averages: bool = False  # a moving average of the policy is saved beside it
    ahead: bool = False  # a rollout is sampled while the one before trains
    check_every_sync: bool = False  # compare engine and policy after each sync, and not only after the first
    state: dict[str, Stateful] = field(default_factory=dict)  # saved beside the weights
    console: TextIO = sys.stderr  # of the live view
    restarts: int = 0  # of the whole run, by --train.max_restarts
    done: int = 0  # rollouts
    saved: bool = False  # the trained model
    stop: StopSignals = field(default_factory=StopSignals)

    def fit(self) -> None:
        """Raises Stopped, with a checkpoint of all that was trained, when the run is asked to end."""
        try:
            self._fit()
        finally:
            for tracker in self.trackers:
                tracker.close()
            self._say_how_it_ended()

    def _fit(self) -> None:
        if self.done < len(self.rollouts) and not self.rollouts.exhausted:
            self._after_last = copy.deepcopy(self._state(self.done))
            try:
                self._train()
            except Stopped:
                if self.done > 0 and self.checkpoints.newest != self.done:
                    self.checkpoints.save(self.done, self._after_last)
                raise
        else:
            logger.info("nothing left to train: all %d rollouts are done", self.done)
        with self.stop.held():
            self.policy.save_model()
            self.saved = True
            self.write_card(self._rows())

    def _train(self) -> None:
        if self.engine:
            self.engine.sync_weights()
            self.engine.check_weights()
        with LiveView(self.console, self.done, len(self.rollouts)) as view:
            self._train_seen(view)

    def _train_seen(self, view: LiveView) -> None:
        clock = Clock(view.phase)
        if self.evaluation and self.done == 0 and self.evaluation.is_due(0, last=False):
            self._log({"step": 0} | self._evaluate(clock) | clock.lap(), view)
        clock.lap()
        for rollout in range(self.done + 1, len(self.rollouts) + 1):
            samples = self.rollouts.sample(rollout, clock)
            with self.stop.held():
                row = self._turn(rollout, samples, clock)
                self._log(row, view)
                if "reward_mean" in row:
                    self.health.check(row)
                else:
                    self.health.check_dropped(row)
                self.done, self._after_last = rollout, copy.deepcopy(self._state(rollout))
                with clock("save"):
                    self.checkpoints.after_rollout(rollout, row, self._after_last)
            self.stop.check()
            if self.rollouts.exhausted and rollout < len(self.rollouts):
                logger.info("rollout %d was the last: dynamic filtering has used up the prompts", rollout)
                break

    def _turn(self, rollout: int, samples: list[Sample], clock: Clock) -> dict:
        groups = whole_groups(samples, self.group_size)
        row: dict = {"step": rollout} | self.scorer.metrics() | self.rollouts.metrics | {"restarts": self.restarts}
        if self.engine:
            row["engine_restarts"] = self.engine.restarts
        if self.ahead and rollout < len(self.rollouts) and not self.rollouts.exhausted:
            with self.stop.held(False):  # the policy is still that of the last checkpoint
                self.rollouts.begin(rollout + 1, clock)
        if groups:
            row |= _sample_metrics(samples)
            with clock("update"):
                row |= self.update(groups, rollout - 1)
            self.samples.write(rollout, groups[0], row.pop("first_advantages", None))
        else:
            logger.warning("rollout %d: every group was dropped, nothing to train on", rollout)
            self.update([], rollout - 1)
        if self.ahead:
            self.rollouts.finish(rollout + 1, clock)  # before the engine has other weights
        if groups and self.engine:
            with clock("sync"):
                self.engine.sync_weights()
                if self.check_every_sync:
                    self.engine.check_weights()
        last = rollout == len(self.rollouts) or self.rollouts.exhausted
        if self.evaluation and self.evaluation.is_due(rollout, last):
            try:
                with self.stop.held(False):
                    row |= self._evaluate(clock)
            except Stopped:
                logger.warning("the evaluation after rollout %d is left out", rollout)
        times = clock.lap()
        if groups:
            tokens = sum(sample.length for sample in samples)
            times["tokens_per_s"] = tokens / times["time/step"]
        return row | times

    def _evaluate(self, clock: Clock) -> dict[str, float]:
        assert self.evaluation is not None and self.engine is not None
        with clock("eval"):
            return self.evaluation.run(self.engine, self.scorer)

    def _rows(self) -> list[dict]:
        return read_metrics(self.metrics.path) if self.metrics.path.exists() else []

    def _say_how_it_ended(self) -> None:
        directory, newest = self.metrics.path.parent, self.checkpoints.newest
        model = f"the trained model is in {directory}" if self.saved else "the trained model is not saved"
        if self.saved and self.averages:
            model += f", its moving average in {directory / EMA_FOLDER}"
        if newest and not self.saved:
            model += f"; the newest checkpoint is that after rollout {newest}"
        for line in closing_lines(self._rows(), self.done, len(self.rollouts), directory, model):
            logger.info("%s", line)

    def _state(self, rollout: int) -> dict:
        return {"step": rollout} | {name: part.state_dict() for name, part in self.state.items()}

    def _log(self, row: dict, view: LiveView) -> None:
        self.metrics.write(row)
        view.show(row)
        rollout = row["step"]
        evaluated = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
        scalars = {k: v for k, v in row.items() if isinstance(v, int | float) and not k.startswith("eval/")}
        for tracker in self.trackers:
            if rollout > 0 and rollout % self.track_every == 0:
                tracker.log_train(rollout, scalars)
            if evaluated:
                tracker.log_eval(rollout, evaluated)


def _sample_metrics(samples: list[Sample]) -> dict[str, float]:
    rewards = [sample.reward for sample in samples]
    metrics = {
        "reward_mean": statistics.fmean(rewards),
        "reward_std": statistics.pstdev(rewards),
        "response_length": statistics.fmean(sample.length for sample in samples),
        "truncated_fraction": statistics.fmean(sample.truncated for sample in samples),
        "token_entropy": -statistics.fmean(log_prob for sample in samples for log_prob in sample.own_log_probs),
    }
    if any(sample.own for sample in samples):
        metrics["feedback_length"] = statistics.fmean(len(sample.response_ids) - sample.length for sample in samples)
    scores = [sample.score for sample in samples if sample.score is not None]
    if scores:
        metrics["score_mean"] = statistics.fmean(scores)
    for key in sorted({key for sample in samples for key in sample.extra}):
        metrics[f"reward/{key}"] = statistics.fmean(s.extra[key] for s in samples if key in s.extra)
    return metrics
