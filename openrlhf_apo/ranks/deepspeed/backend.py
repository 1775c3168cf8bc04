"""Backend over OpenRLHF's Actors in DeepSpeed engines."""

import math
from contextlib import nullcontext

import torch
import torch.distributed as dist
from openrlhf.models import Actor
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from openrlhf_apo.ranks.backend import Weights
from openrlhf_apo.ranks.deepspeed.anchor_weights import AdapterAnchor, AnchorWeights
from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy
from openrlhf_apo.ranks.deepspeed.weight_average import WeightAverage
from openrlhf_apo.ranks.log_probs import has_plain_head, response_log_probs
from openrlhf_apo.ranks.lora import Adapter
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.ranks.shared_prompts import can_share_prompts


class DeepSpeedBackend:
    """scheduler: of the policy's learning rate. anchor, reference, ema: where the run has them; ema_beta: the share of
    its old value that ema keeps at each step. adapter: of a policy with LoRA, which is its own reference and
    anchor."""

    def __init__(
        self,
        strategy: ApoStrategy,
        policy: Actor,
        scheduler,
        anchor: AnchorWeights | AdapterAnchor | None = None,
        reference: Actor | None = None,
        *,
        adapter: Adapter | None = None,
        ema: WeightAverage | None = None,
        ema_beta: float | None = None,
    ):
        self.strategy, self.policy, self.scheduler, self.anchor = strategy, policy, scheduler, anchor
        self.adapter, self.ema, self.ema_beta = adapter, ema, ema_beta
        self.models = {"policy": policy, "reference": reference, "anchor": anchor and anchor.model}
        for config in (model.model.module.config for model in self.models.values() if model is not None):
            if hasattr(config, "output_router_logits"):  # OpenRLHF's Actor asks for them, for its balancing loss
                config.output_router_logits = False
        policy.eval()
        self.vocabulary = policy.model.module.get_input_embeddings().num_embeddings
        self.blockwise = strategy.ring_attn_group is None and has_plain_head(policy.model)
        # ZeRO-3 gathers weights in the order of one forward.
        self.share_prompts = strategy.stage < 3 and can_share_prompts(policy.model)
        self.grad_norm = 0.0
        if strategy.clips_before_the_optimizer:
            policy.model.optimizer.register_step_pre_hook(self._clip)
        self.dp_size = dist.get_world_size(group=strategy.ds_device_mesh["dp"].get_group())

    def forward(
        self, weights: Weights, batch: MicroBatch, *, train: bool = False, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        model = self.models[weights]
        model.train(train)
        batch = batch.to(torch.cuda.current_device())
        with self.adapter.acting_as(weights, self.anchor and self.anchor.average) if self.adapter else nullcontext():
            return self._forward(model, batch, entropy)

    def _forward(self, model: Actor, batch: MicroBatch, entropy: bool) -> tuple[Tensor, Tensor | None]:
        if self.strategy.ring_attn_group is None:
            return response_log_probs(
                model.model,
                batch.sequences,
                batch.attention_mask,
                batch.action_mask,
                temperature=model.temperature,
                entropy=entropy,
                packed=model.packing_samples,
                blockwise=self.blockwise,
                share_prompts=self.share_prompts,
            )
        log_probs, output = model(  # each rank of the ring has a part of every sample
            batch.sequences,
            batch.action_mask,
            batch.attention_mask,
            return_output=True,
            ring_attn_group=self.strategy.ring_attn_group,
            return_entropy=entropy,
        )
        return log_probs, output.entropy if entropy else None

    def backward(self, loss: Tensor) -> None:
        self.strategy.backward(loss, self.policy, None)

    def step(self) -> tuple[float, float]:
        self.strategy.optimizer_step(None, self.policy, self.scheduler, name="actor")
        # In fp16 DeepSpeed passes over a step whose scaled gradient overflows, and lowers the scale: the norm stays.
        skipped = self.strategy.param_dtype == "fp16" and not self.policy.model.was_step_applied()
        if not self.strategy.clips_before_the_optimizer and not skipped:
            self.grad_norm = self.strategy.get_grad_norm(self.policy)
        if self.ema is not None:
            self.ema.update(self.policy, self.ema_beta)
        return self.grad_norm, self.scheduler.get_last_lr()[0]

    def _clip(self, *_) -> None:
        """Before the optimizer's step, with the gradients of all ranks averaged."""
        limit = self.strategy.max_norm if self.strategy.max_norm > 0 else math.inf
        self.grad_norm = clip_grad_norm_(self.policy.parameters(), limit).item()

    def update_anchor(self, beta: float) -> None:
        self.anchor.update(self.policy, beta)
