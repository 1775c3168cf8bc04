"""Checkpoints of the embedded runtime: one file each, whole or not at all, under --ckpt.path/_actor as OpenRLHF's."""

import json
import os
import shutil
from pathlib import Path

import torch

from openrlhf_apo.errors import RunError
from openrlhf_apo.trainer.checkpoints import EMBEDDED_FILE as FILE


class CheckpointFolder:
    """max_num: regular checkpoints kept; max_gb: size of all; both as in OpenRLHF, best ones never removed."""

    def __init__(self, path: str, max_num: int, max_gb: float):
        self.folder, self.max_num, self.max_bytes = Path(path) / "_actor", max_num, max_gb * 1024**3

    def save(self, tag: str, state: dict, metric: tuple[str, float] | None) -> None:
        """The file is complete before `latest` names it, and only then are older ones removed."""
        folder = self.folder / tag
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{FILE}.tmp"
        torch.save(state, partial)
        os.replace(partial, folder / FILE)
        if metric is not None:
            (folder / "metric.json").write_text(json.dumps({"metric_key": metric[0], "metric_value": metric[1]}))
        latest = self.folder / "latest.tmp"
        latest.write_text(tag)
        os.replace(latest, self.folder / "latest")
        self._rotate(tag)

    def load(self) -> dict | None:
        """The latest checkpoint; None where there is none. RunError names one that another runtime wrote."""
        if not (self.folder / "latest").exists():
            return None
        tag = (self.folder / "latest").read_text().strip()
        path = self.folder / tag / FILE
        if not path.exists():
            raise RunError(
                f"the checkpoint {self.folder / tag} is one of --runtime ray: go on with that, or start anew"
            )
        return torch.load(path, map_location="cpu", weights_only=True)

    def _rotate(self, newest: str) -> None:
        folders = [path for path in self.folder.iterdir() if path.is_dir()]
        if newest.startswith("best"):
            for path in folders:
                if path.name.startswith("best") and path.name != newest:
                    shutil.rmtree(path)
        regular = [path for path in folders if not path.name.startswith("best") and path.name != newest]
        regular.sort(key=lambda path: (_metric(path), path.stat().st_mtime))  # worst first, then oldest
        room = self.max_num - (not newest.startswith("best"))
        while regular and (len(regular) > room or _size(self.folder) > self.max_bytes):
            shutil.rmtree(regular.pop(0))


def _metric(folder: Path) -> float:
    path = folder / "metric.json"
    return json.loads(path.read_text())["metric_value"] if path.exists() else float("-inf")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
