"""LoRA: a policy of which only an adapter trains, W + α/r · B A on its linear layers, as OpenRLHF's Actor builds it.

The base model and older versions of the policy are the same model with another adapter, so a reference or an anchor
costs the adapter's kilobytes. What an engine gets is in engine_weights.py.

References: Hu et al., arXiv 2106.09685; Dettmers et al., arXiv 2305.14314 (a base in 4 bits).
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PreTrainedModel

from openrlhf_apo.ranks.backend import Weights
from openrlhf_apo.ranks.engine_weights import ADAPTER, engine_weights

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
            _plain(model.get_base_model()).save_pretrained(folder, state_dict=tensors)
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


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The model or, of one in 4 bits, what it was before, without weights: transformers writes a packed model's folder
    for packed weights alone."""
    config = copy.deepcopy(model.config)
    if not hasattr(config, "quantization_config"):
        return model
    del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)
