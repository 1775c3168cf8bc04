"""A token loss under examination: on the driver and on the ranks as in training, and every result checked."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from openrlhf_apo.errors import LossError, in_one_line
from openrlhf_apo.objectives.registry import TOKEN_LOSSES
from openrlhf_apo.objectives.terms import Terms
from openrlhf_apo.objectives.token_base import TokenLoss

from .findings import watch
from .random_answers import Answers


class Examined:
    """A token loss, built with its defaults. Whatever it raises becomes a LossError of one line. read: the fields of
    the step that its `terms` has read."""

    def __init__(self, name: str):
        self.name = name
        self.loss: TokenLoss = TOKEN_LOSSES[name]()
        self.read: set[str] = set()

    def error(self, message: str) -> LossError:
        return LossError(f"token loss {self.name!r} {message}")

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """method(*arguments), which must not change an argument that is a tensor. Any: your own code may return
        anything."""
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        before = [each.detach().clone() for each in tensors]
        try:
            result = method(*arguments)
        except Exception as error:  # your own code
            said = str(error) if isinstance(error, LossError) else in_one_line(error)
            raise self.error(f"fails in {method.__name__}: {said}") from None
        if not all(map(torch.equal, before, tensors)):
            raise self.error(f"changes its inputs in place in {method.__name__}: work on copies")
        return result

    def terms(self, answers: Answers) -> Terms:
        """The terms of the answers, checked."""
        step, untouched = (answers.step(TOKEN_LOSSES[self.name].uses) for _ in range(2))
        read = watch(step)
        terms = self.call(self.loss.terms, step)
        self.read |= read
        for field in ("rewards", "lengths", "response_ids", "entropies"):
            now, before = vars(step)[field], vars(untouched)[field]
            if not (torch.equal(now, before) if isinstance(now, Tensor) else now == before):
                raise self.error("changes its inputs in place in terms: work on copies")
        if not isinstance(terms, Terms) or set(terms.columns) != {"advantage", "weight"}:
            raise self.error("must return Terms with the columns advantage and weight from terms")
        for column, values in terms.columns.items():
            if not isinstance(values, Tensor) or values.shape != (len(answers.ids),) or values.dtype != torch.float64:
                got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise self.error(f"must give column {column} as float64 [{len(answers.ids)}], got {got}")
            if not values.isfinite().all():
                i = int((~values.isfinite()).nonzero()[0])
                raise self.error(
                    f"has a value in column {column} that is not finite, {values[i].item()} (reward "
                    f"{answers.rewards.flatten()[i].item():g}, {answers.lengths[i]} tokens)"
                )
        weights = terms.token_weights
        if weights is not None and [len(row) for row in weights] != answers.lengths:
            raise self.error("must give token_weights one number per token of each answer")
        for key, value in terms.metrics.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise self.error(f"has a metric that is no finite number, {key} = {value}: leave it out")
        return terms

    def gradient(
        self, answers: Answers, terms: Terms | None = None, dtype: torch.dtype = torch.float64, **layout: Any
    ) -> tuple[Tensor, Tensor]:
        """(value, its gradient in the log-prob of every token, in order), as the ranks compute them."""
        terms = self.terms(answers) if terms is None else terms
        flat = torch.cat(answers.new).to(dtype).requires_grad_()
        value = self.value(terms, list(flat.split(answers.lengths)), [row.to(dtype) for row in answers.old], **layout)
        if not value.requires_grad:
            raise self.error("does not depend on log_probs: it has no gradient")
        try:
            (gradient,) = torch.autograd.grad(value, flat)
        except Exception as error:  # your own code
            raise self.error(f"has a gradient that cannot be computed: {in_one_line(error)}") from None
        for what, found in (("value", value.detach().expand_as(gradient)), ("gradient", gradient)):
            if not found.isfinite().all():
                i = next(i for i, row in enumerate(found.split(answers.lengths)) if not row.isfinite().all())
                x = (answers.new[i] - answers.old[i]).tolist()
                raise self.error(
                    f"has a {what} that is not finite (reward {answers.rewards.flatten()[i].item():g}, "
                    f"{len(x)} tokens, log-ratios {min(x):.3g} to {max(x):.3g})"
                )
        return value.detach(), gradient.double()

    def value(
        self,
        terms: Terms,
        new: list[Tensor],
        old: list[Tensor],
        micro_batches: list[list[int]] | None = None,
        before: int = 0,
        after: int = 0,
        outside: tuple[float, float] = (0.0, 0.0),
    ) -> Tensor:
        """sum_i w_i sum_t f_it loss_it over padded micro-batches. before, after: places outside the response, on its
        two sides. outside: what log_probs and old_log_probs hold there; 0 in training."""
        total = torch.zeros((), dtype=new[0].dtype)
        for rows in micro_batches or [list(range(len(new)))]:
            share = terms.take(rows)
            width = before + max(len(new[i]) for i in rows) + after

            def padded(values: list[Tensor], filler: float = 0.0, width: int = width) -> Tensor:
                return torch.stack([pad(row, (before, width - before - len(row)), value=filler) for row in values])

            log_probs = padded([new[i] for i in rows], outside[0])
            old_log_probs = padded([old[i] for i in rows], outside[1])
            mask = padded([torch.ones_like(new[i]) for i in rows])
            loss = self.per_token(terms.loss, log_probs, old_log_probs, share.column("advantage", log_probs), mask)
            weights = share.column("weight", log_probs) * mask
            if share.token_weights is not None:
                weights = weights * padded([torch.tensor(row).to(log_probs) for row in share.token_weights])
            total = total + (weights * loss).sum()
        return total

    def per_token(
        self, loss: TokenLoss | None, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor
    ) -> Tensor:
        """loss[B, T], checked. loss: that of Terms."""
        assert loss is not None, "Terms with the columns advantage and weight need a loss"
        result = self.call(loss.per_token, log_probs, old_log_probs, advantages, mask)
        if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(each, Tensor) for each in result):
            raise self.error("must return two tensors from per_token, (loss, clipped)")
        for what, values, dtype in zip(("loss", "clipped"), result, (log_probs.dtype, torch.bool), strict=True):
            if values.shape != log_probs.shape or values.dtype != dtype:
                raise self.error(
                    f"must return {what} from per_token as {dtype} [B, T] = {list(log_probs.shape)}, got "
                    f"{values.dtype} {list(values.shape)}"
                )
        return result[0]
