"""The driver's side of a policy: samples dealt to ranks, their answers put together again."""

from collections.abc import Callable

from openrlhf_apo.objectives import Terms
from openrlhf_apo.trainer.handles import Behavior
from openrlhf_apo.trainer.layout import Layout, MicroBatchLimit, make_layout
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.step import Report


class ShardedPolicy:
    """The part of PolicyHandle that trains, over ranks that hold a Learner each (ranks/learner.py).

    A subclass says how ranks are called: `call_ranks(method, arguments)` calls Learner.method(*arguments(rank)) on
    every rank at once and returns one result per rank.
    """

    def __init__(self, num_ranks: int, limit: MicroBatchLimit):
        self.num_ranks, self.limit = num_ranks, limit
        self.layouts: list[Layout] = []
        self.num_samples: list[int] = []

    def call_ranks(self, method: str, arguments: Callable[[int], tuple]) -> list:
        raise NotImplementedError

    def load_steps(self, steps: list[list[Sample]]) -> None:
        lengths = [[sample.total_length for sample in step] for step in steps]
        self.layouts = [make_layout(each, self.num_ranks, self.limit) for each in lengths]
        self.num_samples = [len(step) for step in steps]

        def share(rank: int) -> tuple[list[list[list[Sample]]]]:
            return (
                [
                    [[step[i] for i in micro_batch] for micro_batch in layout.micro_batches[rank]]
                    for step, layout in zip(steps, self.layouts, strict=True)
                ],
            )

        self.call_ranks("load_steps", share)

    def log_prob_sums(self, step: int, weights: Behavior = "policy", keep_graph: bool = False) -> list[float]:
        return self._merged(step, "log_prob_sums", weights, keep_graph)

    def record_old(self, step: int, entropy: bool = False, keep_graph: bool = False) -> list[float] | None:
        per_rank = self.call_ranks("record_old", lambda rank: (step, entropy, keep_graph))
        return self.layouts[step].merge(per_rank, self.num_samples[step]) if entropy else None

    def log_ratios(self, step: int) -> list[list[float]]:
        return self._merged(step, "log_ratios")

    def apply(self, step: int, terms: Terms) -> Report:
        layout = self.layouts[step]
        reports = self.call_ranks("apply", lambda rank: (step, layout.share(terms, rank)))
        return Report.merge(reports, layout, self.num_samples[step])

    def update_anchor(self, beta: float) -> None:
        self.call_ranks("update_anchor", lambda rank: (beta,))

    def _merged(self, step: int, method: str, *arguments: object) -> list:
        per_rank = self.call_ranks(method, lambda rank: (step, *arguments))
        return self.layouts[step].merge(per_rank, self.num_samples[step])
