"""What a checkpoint says of the run that wrote it, so that another run does not go on from it unnoticed."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

from openrlhf_apo.options.rewards import kind_of, reward_words
from openrlhf_apo.trainer.resume import digest

# What may differ where a run is resumed, as no optimizer step follows from it; by prefix. Prompts, which have flags
# under `data.`, are compared by what they are (trainer/resume.py).
FREE = (
    "actor.gradient_checkpointing_",
    "actor.trust_remote_code",
    "apo.check_weights",
    "apo.device",
    "apo.load_rollouts",
    "apo.max_equal_rollouts",
    "apo.max_mismatch",
    "apo.save_rollouts",
    "apo.sync",
    "apo.timeout",
    "ckpt.",
    "config",
    "critic.",
    "data.",
    "dry_run",
    "ds.attn_implementation",
    "ds.packing_samples",
    "eval.",
    "given",
    "local_rank",
    "logger.",
    "ref.",
    "reward.isolate",
    "reward.max_failures",
    "reward.num_",
    "reward.offload",
    "reward.timeout",
    "rollout.max_engine_restarts",
    "rollout.max_tokens_per_gpu",
    "rollout.micro_batch_size",
    "runtime",
    "train.colocate_",
    "train.dynamic_batch_enable",
    "train.max_restarts",
    "train.max_tokens_per_gpu",
    "train.micro_batch_size",
    "use_ms",
    "vllm.",
)
NOT_FREE = ("data.max_len",)
END = 2**20  # bytes of a file's beginning and of its end


def manifest(args: SimpleNamespace) -> dict:
    """{flag: value} of what decides the run's optimizer steps. Files count by their content, and not by their names;
    addresses by a digest, since they may hold a secret."""
    found = {flag: value for flag, value in flat(args).items() if flag in NOT_FREE or not flag.startswith(FREE)}
    found["actor.model_name_or_path"] = _model(args.actor.model_name_or_path)
    if args.loss_path:
        found["loss_path"] = _file(Path(args.loss_path))
    del found["reward.name"], found["reward.remote_url"], found["train.agent_func_path"]
    if args.train.agent_func_path:
        found["reward"] = _file(Path(args.train.agent_func_path))
    elif not args.apo.load_rollouts:
        if args.reward.model_name_or_path:
            found["reward.model_name_or_path"] = _model(args.reward.model_name_or_path)
        found["reward"] = " ".join(map(_reward, reward_words(args)))
    return json.loads(json.dumps(found))  # tuples are lists there


def _file(path: Path) -> str:
    return digest(path.read_bytes())


def _reward(word: str) -> str:
    kind = kind_of(word)
    return _file(Path(word)) if kind == "file" else word if kind == "math_verify" else digest(word.encode())


def _model(name: str) -> str:
    """Of a folder its configuration and, of each file of weights, its size and both ends (to read a large model whole
    takes minutes); of a hub model the name."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        return name
    content = [(folder / "config.json").read_bytes()]
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for start in (0, max(0, size - END)):
                file.seek(start)
                content.append(file.read(END))
        content.append(f"{path.name} {size}".encode())
    return digest(b"".join(content))


def flat(settings: SimpleNamespace, prefix: str = "") -> dict:
    """{flag: value} of nested settings."""
    found: dict = {}
    for name, value in vars(settings).items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, SimpleNamespace) else {f"{prefix}{name}": value}
    return found
