"""The model's configuration can be read, asks for no code that was not allowed, and fits the flags."""

import json
import os
import re
from types import SimpleNamespace

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.errors import OptionError
from openrlhf_apo.trainer.model_folder import ADAPTER, is_adapter


def check_model(args: SimpleNamespace) -> None:
    """Also chooses the weight sync of a mixture of experts."""
    model = args.actor.model_name_or_path
    if is_adapter(model):
        model = _base_of_adapter(args)
    config = _read_config("--actor.model_name_or_path", model, args.actor.trust_remote_code)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if args.runtime == "ray" and not has_cuda() and not args.apo.load_rollouts and (head_dim < 32 or head_dim % 16):
        raise OptionError(f"--actor.model_name_or_path {model}: vLLM on CPU has no attention for head_dim {head_dim}")
    _check_experts(args, config.to_dict())
    if args.ds.lora.rank:
        _check_lora(args, config)
    if args.reward.model_name_or_path:
        _check_reward_model(args)


def _check_reward_model(args: SimpleNamespace) -> None:
    """It has a value head, or OpenRLHF's loader would make one up; and what normalizes its rewards, if asked for."""
    flag, model = "--reward.model_name_or_path", args.reward.model_name_or_path
    config = _read_config(flag, model, args.actor.trust_remote_code).to_dict()
    prefix = config.get("value_head_prefix", args.ds.value_head_prefix)
    if "ds.value_head_prefix" in args.given and prefix != args.ds.value_head_prefix:
        raise OptionError(f"--ds.value_head_prefix has no effect: config.json of {model} says {prefix}; drop it")
    try:
        names = _weight_names(model)
    except OSError as error:
        raise OptionError(f"{flag} {model} has no weights in safetensors: {str(error).splitlines()[0]}") from None
    if f"{prefix}.weight" not in names:
        heads = sorted(name.removesuffix(".weight") for name in names if name.count(".") == 1)
        raise OptionError(
            f"{flag} {model} has no value head {prefix}.weight: it is no reward model, or give --ds.value_head_prefix"
            + (f" ({', '.join(heads)} is there)" if heads else "")
        )
    if args.reward.normalize_enable and not {"mean", "std"} <= config.keys():
        raise OptionError(
            f"--reward.normalize_enable has no effect: config.json of {model} has no mean and std; drop it"
        )


def _weight_names(model: str) -> list[str]:
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(model, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            return list(json.load(file)["weight_map"])
    weights = cached_file(model, "model.safetensors")
    if weights is None:  # of a folder without it
        raise OSError("no model.safetensors there")
    with safe_open(weights, "pt") as file:
        return list(file.keys())


def _read_config(flag: str, model: str, trust_remote_code: bool):
    """transformers' configuration of a model that was given by `flag`."""
    if not os.path.isdir(model):  # nor is the hub asked for a mistyped folder, which takes a minute of tries offline
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", model):
            raise OptionError(f"{flag} {model}: no such folder, and no hub name, OWNER/NAME: correct the path")
        if os.path.isdir(owner := model.partition("/")[0]):
            raise OptionError(
                f"{flag} {model}: no such folder in {owner}: correct the path (a hub model can be "
                f"meant only where there is no folder {owner})"
            )
    from transformers import AutoConfig

    try:
        # OpenRLHF loads model and tokenizer with their code allowed, so what brings code is refused before.
        if not trust_remote_code and any(map(_brings_code, _configurations(model))):
            raise OptionError(f"{flag} {model} brings its own code: read it, then give --actor.trust_remote_code")
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(f"{flag} {model}: {str(error).splitlines()[0]}") from None


def _base_of_adapter(args: SimpleNamespace) -> str:
    """The model that the adapter of --actor.model_name_or_path belongs to. Embedded, they are loaded merged."""
    adapter = args.actor.model_name_or_path
    with open(os.path.join(adapter, ADAPTER), encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    if not base:
        raise OptionError(
            f"--actor.model_name_or_path {adapter} is an adapter whose {ADAPTER} names no base_model_name_or_path: "
            "write it there"
        )
    if args.runtime == "ray" or args.ds.lora.rank:
        raise OptionError(
            f"--actor.model_name_or_path {adapter} is a LoRA adapter: merge it, by `python -m "
            f"openrlhf.cli.lora_combiner --model_path {base} --lora_path {adapter} --output_path MERGED`, and give "
            "MERGED (or train with --ckpt.merge_lora)"
        )
    return base


def _check_lora(args: SimpleNamespace, config) -> None:
    """Each of --ds.lora.target_modules names linear layers; peft passes over a name where another one matches."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    targets = args.ds.lora.target_modules
    if targets == "all-linear":
        return
    with torch.device("meta"):  # without weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.actor.trust_remote_code)
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear | Conv1D)}
    there = sorted({name.rpartition(".")[2] for name in linear})
    if not targets:
        raise OptionError(f"--ds.lora.target_modules names no layer: give some of {', '.join(there)}, or drop it")
    output = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    for target in targets:
        named = {name for name in modules if name == target or name.endswith(f".{target}")}  # as peft has it
        if not named or named - linear:
            raise OptionError(
                f"--ds.lora.target_modules {target}: no linear layers of {args.actor.model_name_or_path}; it has "
                f"{', '.join(there)}"
            )
        if output in named and config.tie_word_embeddings:
            raise OptionError(
                f"--ds.lora.target_modules {target}: the model's output matrix is its embedding, which an adapter "
                "would take apart: drop it"
            )


def _configurations(model: str) -> list[str]:
    """The files that may name code to run."""
    from transformers.utils import cached_file

    tokenizer = cached_file(model, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
    config = cached_file(model, "config.json")
    if config is None:  # of a folder without it
        raise OSError("no config.json there")
    return [config, *([tokenizer] if tokenizer else [])]


def _brings_code(path: str) -> bool:
    with open(path, encoding="utf-8") as file:
        return "auto_map" in json.load(file)


def _check_experts(args: SimpleNamespace, config: dict) -> None:
    model, experts = args.actor.model_name_or_path, any("experts" in key for key in config)
    if experts and args.runtime == "ray" and args.apo.sync is None:
        args.apo.sync = "buckets"  # after the last of which vLLM brings the experts into the order of its kernel
        for flag in ("vllm.sync_backend", "vllm.sync_with_ray"):
            if flag in args.given:
                raise OptionError(f"--{flag} has no effect: {model} has experts, whose weights go in buckets; drop it")
    if args.ds.experts_implementation and not experts:
        raise OptionError(f"--ds.experts_implementation has no effect: {model} has no experts; drop it")
    if args.actor.aux_loss_coef > 0 and "output_router_logits" not in config:
        raise OptionError(f"--actor.aux_loss_coef has no effect: {model} has no balancing loss; drop it")
