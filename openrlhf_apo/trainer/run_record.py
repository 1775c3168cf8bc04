"""run.json in --ckpt.output_dir: what a run was started with, as its command line and as what came of it."""

import json
import platform
import re
from datetime import datetime
from importlib import metadata
from pathlib import Path

from openrlhf_apo.trainer.files import move_aside, write_whole

NAME = "run.json"
SECRET = "logger.wandb.key"  # the only flag whose value is never shown
PACKAGES = ("openrlhf_apo", "torch", "transformers", "openrlhf", "deepspeed", "vllm", "ray")


def hide_key(command: str) -> str:
    """A shell's command, in which the key is named and not shown."""
    return re.sub(rf"(--{SECRET}[ =])\S+", r'\1"$WANDB_API_KEY"', command)


def write_run_record(directory: str, record: dict, manifest: dict, resumed_after: int | None) -> None:
    """Write what `record` (options/record.py) says of this start, with what is known only now.

    `starts` lists all starts of the run, this one last, each without `settings`; a run that is new (resumed_after
    None) moves the file of the run before aside. manifest: of the run, with its data.
    """
    path = Path(directory) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = []
    if path.exists():
        if resumed_after is None:
            move_aside(path)
        else:
            starts = json.loads(path.read_text(encoding="utf-8")).get("starts", [])
    flags = {"model": "actor.model_name_or_path", "data": "data.prompt_dataset", "reward": "reward.remote_url"}
    flags |= {"rollouts": "apo.load_rollouts", "loss": "loss_path"}
    record = record | {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_after": resumed_after,
        "versions": versions(),
        "fingerprints": {name: manifest[flag] for name, flag in flags.items() if manifest.get(flag)},
    }
    start = {key: value for key, value in record.items() if key != "settings"}
    content = json.dumps(record | {"starts": [*starts, start]}, indent=1, default=str)
    write_whole(path, hide_in_addresses(content) + "\n")


def hide_in_addresses(text: str) -> str:
    """User and query of an address may hold a secret."""
    text = re.sub(r"(https?://)[^\s/@\"',]+@", r"\1...@", text)
    return re.sub(r"(https?://[^\s?\"',]+\?)[^\s\"',]+", r"\1...", text)


def versions() -> dict[str, str | None]:
    """None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
