"""Backend over a transformers model and torch's AdamW."""

import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from openrlhf_apo.errors import RunError
from openrlhf_apo.ranks.backend import Weights
from openrlhf_apo.ranks.log_probs import has_plain_head, response_log_probs
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.ranks.shared_prompts import can_share_prompts

if TYPE_CHECKING:  # it imports peft, which only a run with LoRA wants
    from openrlhf_apo.ranks.lora import Adapter

NO_DECAY = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")  # as in OpenRLHF


@dataclass(frozen=True)
class OptimizerPlan:
    """OpenRLHF's --actor.adam.* and --actor.lr_scheduler, and its defaults' meaning."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_norm: float  # of the gradient; 0 for no clipping
    scheduler: str
    warmup_ratio: float
    min_lr_ratio: float
    steps: int


class TorchBackend:
    """The policy and its frozen copies (anchor, reference, ema), whole and in one dtype. temperature: of the rollout.
    adapter: of a policy with LoRA, which is its own anchor and reference. ema: the share of its old value that a
    moving average of the policy keeps at each step; None: there is none."""

    dp_size = 1

    def __init__(
        self,
        model: nn.Module,
        plan: OptimizerPlan,
        temperature: float,
        *,
        anchor: bool = False,
        reference: bool = False,
        shared: bool = False,
        adapter: "Adapter | None" = None,
        ema: float | None = None,
    ):
        self.temperature, self.max_norm, self.adapter, self.ema = temperature, plan.max_norm, adapter, ema
        self.models: dict[str, nn.Module] = {"policy": model}
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.blockwise, self.share_prompts = has_plain_head(model), can_share_prompts(model)
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.moving: dict[str, dict[str, Tensor]] = {}  # of the anchor and of ema, by the policy's names
        if adapter is not None:
            self.models |= {"anchor": model, "reference": model}
            if anchor:
                self.moving["anchor"] = {name: weight.detach().clone() for name, weight in self.trained.items()}
        elif anchor:
            self.models["anchor"] = _frozen_copy(model)
            self.moving["anchor"] = dict(self.models["anchor"].named_parameters())
        if reference and adapter is None:
            self.models["reference"] = self.models["anchor"] if shared else _frozen_copy(model)
        if ema is not None:
            self.models["ema"] = _frozen_copy(model)
            self.moving["ema"] = dict(self.models["ema"].named_parameters())
        undecayed = [weight for name, weight in self.trained.items() if any(part in name for part in NO_DECAY)]
        decayed = [weight for name, weight in self.trained.items() if not any(part in name for part in NO_DECAY)]
        groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, fused=True)
        with_min = plan.scheduler in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
        self.scheduler = get_scheduler(
            plan.scheduler,
            self.optimizer,
            num_warmup_steps=math.ceil(plan.steps * plan.warmup_ratio),
            num_training_steps=plan.steps,
            scheduler_specific_kwargs={"min_lr_rate": plan.min_lr_ratio} if with_min else {},
        )

    @property
    def model(self) -> nn.Module:
        return self.models["policy"]

    def forward(
        self, weights: Weights, batch: MicroBatch, *, train: bool = False, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        model = self.models[weights]
        model.train(train)
        batch = batch.to(model.device)
        with self.adapter.acting_as(weights, self.moving.get("anchor")) if self.adapter else nullcontext():
            return response_log_probs(
                model,
                batch.sequences,
                batch.attention_mask,
                batch.action_mask,
                temperature=self.temperature,
                entropy=entropy,
                blockwise=self.blockwise,
                share_prompts=self.share_prompts,
            )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> tuple[float, float]:
        limit = self.max_norm if self.max_norm > 0 else math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.ema is not None:
            self._average("ema", self.ema)
        return norm, self.scheduler.get_last_lr()[0]

    def update_anchor(self, beta: float) -> None:
        self._average("anchor", beta)

    @torch.no_grad()
    def _average(self, moving: str, beta: float) -> None:
        policys = dict(self.model.named_parameters())
        for name, mine in self.moving[moving].items():
            mine.lerp_(policys[name], 1.0 - beta)

    def state_dict(self) -> dict:
        """With LoRA the adapter's tensors and the optimizer's of them: the base model is what it was."""
        policy = self.model.state_dict() if self.adapter is None else self.trained
        state = {"policy": policy, "optimizer": self.optimizer.state_dict()}
        state["scheduler"] = self.scheduler.state_dict()
        return state | self.moving

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if self.adapter is None:
            self.model.load_state_dict(state["policy"])
        else:
            _restore(self.trained, state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for name, tensors in self.moving.items():
            if name not in state:
                raise RunError(f"the checkpoint has no {name} weights: resume with the flags that wrote it")
            _restore(tensors, state[name])


def _restore(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False).eval()
