"""Held-out prompts: how the policy does on what it is not trained on."""

import logging
import statistics

from openrlhf_apo.trainer.handles import EngineHandle, SamplingSettings
from openrlhf_apo.trainer.metrics import as_score
from openrlhf_apo.trainer.prompts import PromptRow
from openrlhf_apo.trainer.samples import Sample, whole_groups
from openrlhf_apo.trainer.scoring import Scorer

logger = logging.getLogger(__name__)


class Evaluation:
    """`eval/pass1` is the mean score, `eval/pass<k>` the mean of the best of k; of graded scores, `eval/score_mean`
    and `eval/score_best<k>` (metrics.py). An answer without a score has its reward as one. `eval/distinct_right`: how
    many different answers to a prompt have a score above 0.

    every: rollouts between evaluations, None for none; ends: also before the first and after the last rollout.
    """

    def __init__(self, rows: list[PromptRow], settings: SamplingSettings, every: int | None, ends: bool):
        # Group ids of their own, below those of the training stream.
        self.prompts = [row.prompt(-1 - i) for i, row in enumerate(rows)]
        self.settings, self.every, self.ends = settings, every, ends

    def is_due(self, rollout: int, last: bool) -> bool:
        """After a rollout, or before the first one (0)."""
        regular = rollout > 0 and self.every is not None and rollout % self.every == 0
        return regular or (self.ends and (rollout == 0 or last))

    def run(self, engine: EngineHandle, scorer: Scorer) -> dict[str, float]:
        samples = scorer.score(engine.generate(self.prompts, self.settings))
        groups = whole_groups(samples, self.settings.samples_per_prompt)
        if not groups:
            logger.warning("the evaluation has no result: of every prompt an answer's reward failed")
            return {}
        metrics = _rates("eval/", groups)
        sources = sorted({group[0].datasource for group in groups})
        for source in sources if len(sources) > 1 else ():
            metrics |= _rates(f"eval/{source}/", [group for group in groups if group[0].datasource == source])
        if any(sample.score_or_reward not in (0, 1) for sample in samples):
            metrics = {as_score(key): value for key, value in metrics.items()}
        metrics["eval/response_length"] = statistics.fmean(s.length for s in samples)
        metrics["eval/truncated_fraction"] = statistics.fmean(s.truncated for s in samples)
        return metrics


def _rates(prefix: str, groups: list[list[Sample]]) -> dict[str, float]:
    scores = [[sample.score_or_reward for sample in group] for group in groups]
    rates = {f"{prefix}pass1": statistics.fmean(map(statistics.fmean, scores))}
    if (k := len(scores[0])) > 1:
        rates[f"{prefix}pass{k}"] = statistics.fmean(map(max, scores))
        rates[f"{prefix}distinct_right"] = statistics.fmean(
            len({sample.response for sample in group if sample.score_or_reward > 0}) for group in groups
        )
    return rates
