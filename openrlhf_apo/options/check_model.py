"""The model's configuration can be read, asks for no code that was not allowed, and fits the flags."""

import json
from types import SimpleNamespace

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.errors import OptionError


def check_model(args: SimpleNamespace) -> None:
    from transformers import AutoConfig
    from transformers.utils import cached_file

    model = args.actor.model_name_or_path
    try:
        path = cached_file(model, "config.json")
        with open(path, encoding="utf-8") as file:
            brings_code = "auto_map" in json.load(file)
        if brings_code and not args.actor.trust_remote_code:
            raise OptionError(
                f"--actor.model_name_or_path {model} brings its own code: read it, then give --actor.trust_remote_code"
            )
        config = AutoConfig.from_pretrained(model, trust_remote_code=args.actor.trust_remote_code)
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"--actor.model_name_or_path {model}: {str(error).splitlines()[0]}") from None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if args.runtime == "ray" and not has_cuda() and not args.apo.load_rollouts and (head_dim < 32 or head_dim % 16):
        raise OptionError(f"--actor.model_name_or_path {model}: vLLM on CPU has no attention for head_dim {head_dim}")
    _check_experts(args, config.to_dict())


def _check_experts(args: SimpleNamespace, config: dict) -> None:
    model = args.actor.model_name_or_path
    if args.ds.experts_implementation and not any("experts" in key for key in config):
        raise OptionError(f"--ds.experts_implementation has no effect: {model} has no experts; drop it")
    if args.actor.aux_loss_coef > 0 and "output_router_logits" not in config:
        raise OptionError(f"--actor.aux_loss_coef has no effect: {model} has no balancing loss; drop it")
