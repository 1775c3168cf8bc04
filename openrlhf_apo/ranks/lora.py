"""LoRA: a policy of which only an adapter trains, W + α/r · B A on its linear layers, as OpenRLHF's Actor builds it.

The base model and older versions of the policy are the same model with another adapter, so a reference or an anchor
costs the adapter's kilobytes. An engine gets whole weights, merged into tensors of their own: merging in place and
taking it back would change the policy's by rounding.

Reference: Hu et al., arXiv 2106.09685.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter

from openrlhf_apo.ranks.backend import Weights

ADAPTER = "default"  # peft's name of the only one
WEIGHTS_FILE = "adapter_model.safetensors"


def add_adapter(model: nn.Module, rank: int, alpha: int, target_modules: str | list[str]) -> PeftModel:
    """The model with an adapter that adds nothing yet (B = 0). Draws A from torch's random numbers."""
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha, target_modules=target_modules, bias="none"
    )
    return get_peft_model(model, config)


class Adapter:
    """What trains of a model with LoRA. numbers: where a rank has those of a parameter, to be written in place."""

    def __init__(self, model: PeftModel, numbers: Callable[[Parameter], Tensor] = lambda parameter: parameter.data):
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.numbers = numbers

    @contextmanager
    def acting_as(self, weights: Weights, anchor: dict[str, Tensor] | None) -> Iterator[None]:
        """The policy's model is the anchor, by the anchor's tensors, or the reference: the base model, to which an
        adapter with B = 0 adds nothing. Afterwards the policy's adapter is what it was, bit by bit, and
        no graph that was kept meanwhile notices."""
        if weights == "policy":
            yield
            return
        before = {name: self.numbers(weight).clone() for name, weight in self.parameters.items()}
        base = {name: torch.zeros_like(value) for name, value in before.items() if ".lora_B." in name}
        self._write(anchor if weights == "anchor" else base)
        try:
            yield
        finally:
            self._write(before)

    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.numbers(self.parameters[name]).copy_(value)


@dataclass(frozen=True)
class EngineWeight:
    """A weight under the name that the base model has for it, and the adapter's layer around it, if any."""

    name: str
    weight: Parameter
    layer: LoraLayer | None = None

    @property
    def parts(self) -> list[Parameter]:
        """What it is made of."""
        return [self.weight] if self.layer is None else [self.weight, *self._factors()]

    def merged(self) -> Tensor:
        """W + α/r · B A, computed in float32 and rounded once to the dtype of W. The policy keeps what it has."""
        if self.layer is None:
            return self.weight.detach()
        a, b = (factor.detach().float() for factor in self._factors())
        product = b @ a
        if self.layer.fan_in_fan_out:  # GPT-2 has its matrices the other way round
            product = product.T
        return (self.weight.detach().float() + self.layer.scaling[ADAPTER] * product).to(self.weight.dtype)

    def _factors(self) -> tuple[Parameter, Parameter]:
        return self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight


def engine_weights(model: nn.Module) -> list[EngineWeight]:
    """All weights of the model, in its order; the adapter's are in those of its layers."""
    if not isinstance(model, PeftModel):
        return [EngineWeight(name, weight) for name, weight in model.named_parameters()]
    base = model.get_base_model()
    layers = {f"{name}.base_layer.weight": m for name, m in base.named_modules() if isinstance(m, LoraLayer)}
    return [
        EngineWeight(name.replace(".base_layer.", "."), weight, layers.get(name))
        for name, weight in base.named_parameters()
        if not weight.requires_grad
    ]


def save_trained(
    model: PeftModel,
    folder: str,
    merge: bool,
    gathered: Callable[[list[Parameter]], AbstractContextManager] = lambda weights: nullcontext(),
    writes: bool = True,
) -> None:
    """The adapter, as peft reads it, and transformers where no config.json is beside it; or a Hugging Face folder of
    the whole model, merged. gathered: in which weights of a sharded model are whole; all ranks together, of which one
    `writes`.

    Not by peft's save_pretrained, which knows no shards and writes a README.md of its own.
    """
    tensors: dict[str, Tensor] = {}
    if merge:
        for each in engine_weights(model):
            with gathered(each.parts):
                if writes:
                    tensors[each.name] = each.merged().cpu().clone()
        if writes:
            model.get_base_model().save_pretrained(folder, state_dict=tensors)
        return
    for name, weight in Adapter(model).parameters.items():
        with gathered([weight]):
            if writes:
                tensors[name] = weight.detach().cpu().clone()
    if writes:
        os.makedirs(folder, exist_ok=True)
        kept = get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
        save_file(kept, os.path.join(folder, WEIGHTS_FILE), {"format": "pt"})
        model.peft_config[ADAPTER].save_pretrained(folder)
