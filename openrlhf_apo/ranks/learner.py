"""One rank's share of an optimizer step: log-probs, and the sum over its samples forward and backward."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from openrlhf_apo.errors import RunError
from openrlhf_apo.objectives import Terms
from openrlhf_apo.objectives.kl import approximate_kl
from openrlhf_apo.ranks.backend import Backend
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.ranks.micro_batch_loss import micro_batch_loss
from openrlhf_apo.trainer.handles import Behavior
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.step import Report

GO_BACK = "go back to a checkpoint, and lower --actor.adam.lr or --actor.max_norm"


class Learner:
    """Holds this rank's micro-batches of a rollout. All ranks make the same calls with equally many micro-batches.
    entropy: whether training needs each token's. behavior: whose log-probs are those of π_old."""

    def __init__(
        self,
        backend: Backend,
        pad_token_id: int,
        kl_estimator: str = "k3",
        entropy: bool = False,
        behavior: Behavior = "policy",
    ):
        self.backend, self.pad_token_id = backend, pad_token_id
        self.kl_estimator, self.entropy, self.behavior = kl_estimator, entropy, behavior
        self.steps: list[list[MicroBatch]] = []
        self.old: dict[tuple[int, int], Tensor] = {}  # (step, micro-batch) -> log π_old [B, T-1]
        self.reference_log_probs: dict[tuple[int, int], Tensor] = {}
        self.updated = False  # whether the policy has left pi_old
        self.graph: tuple[int, tuple[Tensor, Tensor | None]] | None = None  # step -> forward of its first micro-batch

    def load_steps(self, steps: list[list[list[Sample]]]) -> None:
        """steps[step][micro-batch] = samples. Replaces the rollout before."""
        self.steps = [[MicroBatch.of(samples, self.pad_token_id) for samples in step] for step in steps]
        largest = max((int(batch.sequences.max()) for step in self.steps for batch in step), default=0)
        if largest >= self.backend.vocabulary:
            raise RunError(
                f"a sample has token {largest}, the policy only {self.backend.vocabulary} tokens: it was made with "
                "another tokenizer"
            )
        self.old, self.reference_log_probs, self.graph, self.updated = {}, {}, None, False

    def log_prob_sums(self, step: int, weights: Behavior, keep_graph: bool) -> list[float]:
        """Σ_t log π of this rank's samples of the step, in the order they were loaded, nats."""
        sums: list[float] = []
        for k, (log_probs, _) in enumerate(self._forward(step, weights, keep_graph=keep_graph)):
            if weights == self.behavior and not self.updated:
                self.old[step, k] = log_probs
            sums += log_probs.double().sum(-1).tolist()
        if not all(map(math.isfinite, sums)):
            raise RunError(f"log-probs of the {weights} are not finite: its weights hold NaN or Inf; {GO_BACK}")
        return sums

    def record_old(self, step: int, entropy: bool, keep_graph: bool) -> list[float]:
        """Keep log π_old; with `entropy`, the mean token entropy of each sample."""
        means: list[float] = []
        if (step, 0) in self.old and not entropy:
            return means
        for k, (log_probs, entropies) in enumerate(self._forward(step, self.behavior, entropy, keep_graph)):
            self.old[step, k] = log_probs
            if entropies is not None:
                mask = self.steps[step][k].action_mask.to(entropies.device)
                means += ((entropies * mask).double().sum(-1) / mask.sum(-1)).tolist()
        return means

    def log_ratios(self, step: int) -> list[list[float]]:
        """log π_θ − log π_old of each token of each sample; keeps the graph."""
        ratios: list[list[float]] = []
        recorded = (step, 0) in self.old
        current = self._forward(step, "policy", keep_graph=True) if recorded else []
        for k, batch in enumerate(self.steps[step]):
            difference = torch.zeros_like(batch.rollout_log_probs)
            if recorded:
                difference = current[k][0].cpu() - self.old[step, k].cpu()
            ratios += [row[mask > 0].tolist() for row, mask in zip(difference, batch.action_mask, strict=True)]
        return ratios

    def _forward(
        self, step: int, weights: Behavior, entropy: bool = False, keep_graph: bool = False
    ) -> list[tuple[Tensor, Tensor | None]]:
        """(log-probs, entropies or None), [B, T-1] each, of each micro-batch of the step, without gradient. Of the
        engine they are what it reported, on the CPU, and there are no entropies.

        keep_graph: the first one's graph stays for `apply`, which holds one graph at any time anyway; a step that is
        one micro-batch needs no second forward.
        """
        if weights == "engine":
            return [(batch.rollout_log_probs, None) for batch in self.steps[step]]
        first, *others = self.steps[step]
        with torch.no_grad():
            rest = [self.backend.forward(weights, batch, entropy=entropy) for batch in others]
            if not keep_graph:
                return [self.backend.forward(weights, first, entropy=entropy), *rest]
        log_probs, entropies = self.backend.forward("policy", first, train=True, entropy=entropy or self.entropy)
        self.graph = step, (log_probs, entropies)
        return [(log_probs.detach(), entropies.detach() if entropies is not None else None), *rest]

    def apply(self, step: int, terms: Terms) -> Report:
        """Gradient of the sum over all ranks' samples, then one optimizer step. `terms` and the report are those of
        this rank's samples, in the order they were loaded."""
        log_prob_sums: list[float] = []
        log_ratio_sums: list[float] = []
        filtered_sums: list[float] = []
        token_sums: dict[str, float] = defaultdict(float)
        total_loss, num_tokens = 0.0, 0.0
        for k, batch in enumerate(self.steps[step]):
            start = len(log_prob_sums)
            share = terms.take(list(range(start, start + len(batch.sequences))))
            reference = self._reference(step, k, batch) if terms.needs_reference else None
            if k == 0 and self.graph is not None and self.graph[0] == step:
                (_, (log_probs, entropies)), self.graph = self.graph, None
            else:
                log_probs, entropies = self.backend.forward("policy", batch, train=True, entropy=self.entropy)
            detached = log_probs.detach()
            old = self.old.setdefault((step, k), detached).to(detached) if terms.needs_old else detached
            rollout, mask = batch.rollout_log_probs.to(detached), batch.action_mask.to(log_probs)
            loss, tokens = micro_batch_loss(
                share, log_probs, mask, old, rollout, reference, entropies, self.kl_estimator
            )
            if not math.isfinite(loss.item()):
                raise RunError(f"the loss of a micro-batch is {loss.item()}; {GO_BACK}")
            # The backend averages over the data-parallel ranks; the objective is a sum over them.
            self.backend.backward(loss * self.backend.dp_size)
            total_loss += loss.item()
            log_prob_sums += detached.double().sum(-1).tolist()
            log_ratio_sums += (detached - old).double().sum(-1).tolist()
            filtered_sums += (tokens.pop("is_filtered", torch.zeros_like(mask)) * mask).sum(-1).tolist()
            tokens["fresh"] = batch.fresh.to(detached).expand_as(detached)
            sampled = rollout if self.behavior == "engine" else self.old.get((step, k), detached)
            # What the policy has learned since it sampled a stale answer is no fault of the engine's.
            tokens["mismatch"] = (sampled - rollout).abs() * tokens["fresh"]
            if self.behavior != "policy":
                tokens["staleness_kl"] = approximate_kl(sampled, detached, "k3")
            counted = mask * share.column("real", mask)
            num_tokens += counted.sum().item()
            for name, values in tokens.items():
                token_sums[name] += (values * counted).sum().item()
        grad_norm, lr = self.backend.step()
        self.updated = True
        if not math.isfinite(grad_norm):
            raise RunError(f"the norm of the gradient is {grad_norm}; {GO_BACK}")
        return Report(
            *(log_prob_sums, log_ratio_sums, grad_norm, lr, total_loss, dict(token_sums), num_tokens),
            filtered_sums=filtered_sums,
        )

    def update_anchor(self, beta: float) -> None:
        self.backend.update_anchor(beta)

    def _reference(self, step: int, k: int, batch: MicroBatch) -> Tensor:
        if (step, k) not in self.reference_log_probs:
            with torch.no_grad():
                self.reference_log_probs[step, k] = self.backend.forward("reference", batch)[0]
        return self.reference_log_probs[step, k]
