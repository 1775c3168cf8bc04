"""The policy's weights as an engine loads them: whole, in one dtype, under the names of the base model.

- With LoRA W + α/r · B A, merged into tensors of their own: merging in place and taking it back would change the
  policy's by rounding.
- A base in 4 bits (`--ds.load_in_4bit`) is unpacked: an engine has the numbers that the policy computes with, and not
  those that were packed.
"""

from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name of the only one


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

    @property
    def nbytes(self) -> int:
        """Of what an engine gets, where the model is not sharded."""
        if not self._packed:
            return self.weight.nbytes
        state = self.weight.quant_state
        return state.shape.numel() * state.dtype.itemsize

    def merged(self) -> Tensor:
        """W + α/r · B A, computed in float32 and rounded once to the dtype of W. The policy keeps what it has."""
        base = dequantize_bnb_weight(self.weight) if self._packed else self.weight.detach()
        if self.layer is None:
            return base
        a, b = (factor.detach().float() for factor in self._factors())
        product = b @ a
        if self.layer.fan_in_fan_out:  # GPT-2 has its matrices the other way round
            product = product.T
        return (base.float() + self.layer.scaling[ADAPTER] * product).to(base.dtype)

    @property
    def _packed(self) -> bool:
        return get_bnb_param_type(self.weight) == "4bit"

    def _factors(self) -> tuple[Parameter, Parameter]:
        return self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight


def engine_weights(model: PreTrainedModel | PeftModel) -> list[EngineWeight]:
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
