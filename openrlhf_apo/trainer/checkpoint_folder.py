"""--ckpt.path/_actor: a folder per checkpoint, and in each a marker, written last, by which it is known as complete.

Whatever kills a run in the middle of a save leaves a folder without a marker, which is passed over; the checkpoints
before it go only after the new one has its marker.
"""

import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from openrlhf_apo.errors import OptionError, RunError, in_one_line
from openrlhf_apo.trainer.files import move_aside, sync, write_whole

logger = logging.getLogger(__name__)

MARKER = "complete.json"
EMBEDDED_FILE = "embedded.pt"  # in a checkpoint of the embedded runtime, by which the other one knows it


@dataclass(frozen=True)
class Checkpoint:
    """A complete one, as its marker describes it."""

    folder: Path
    rollout: int  # the last one that was trained on
    time: float  # seconds since 1970
    metric: float | None  # of the last evaluation, where there was one
    manifest: dict  # of the run that wrote it (options/manifest.py)
    sizes: dict[str, int]  # of its files, bytes

    @property
    def embedded(self) -> bool:
        return EMBEDDED_FILE in self.sizes

    def damage(self) -> str | None:
        """What is wrong with its files; None for nothing."""
        for name, size in self.sizes.items():
            path = self.folder / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
        return None


class CheckpointFolder:
    """Written by one run at a time. max_num, max_gb: as OpenRLHF's --ckpt.max_num and --ckpt.max_mem; the newest
    checkpoint and the best one never go. manifest: of this run."""

    def __init__(self, path: str, max_num: int, max_gb: float, manifest: dict):
        self.root = Path(path) / "_actor"
        self.max_num, self.max_bytes, self.manifest = max_num, max_gb * 1024**3, manifest

    def begin(self, tag: str) -> None:
        """Before the files of a checkpoint are written, into `root/tag`."""
        if (self.root / tag).exists():
            shutil.rmtree(self.root / tag)
        (self.root / tag).mkdir(parents=True)

    def finish(self, tag: str, rollout: int, metric: float | None) -> None:
        """After its files were written: sync them, mark the checkpoint as complete, let older ones go."""
        folder = self.root / tag
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in files:
            sync(path)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        marked = Checkpoint(folder, rollout, time.time(), metric, self.manifest, sizes)
        content = {key: value for key, value in asdict(marked).items() if key != "folder"}
        write_whole(folder / MARKER, json.dumps(content, indent=1))
        write_whole(self.root / "latest", tag)  # DeepSpeed's own tools look for it
        self._rotate(marked)

    def _rotate(self, newest: Checkpoint) -> None:
        best = newest.folder.name.startswith("best")
        checkpoints = {each.folder: each for each in complete_checkpoints(self.root)}
        for folder in self.root.iterdir():
            replaced = best and folder.name.startswith("best") and folder != newest.folder
            if folder.is_dir() and (replaced or folder not in checkpoints):  # or never finished
                shutil.rmtree(folder)
                checkpoints.pop(folder, None)
        regular = [each for each in checkpoints.values() if not each.folder.name.startswith("best")]
        if newest in regular:
            regular.remove(newest)
        # As in OpenRLHF, those without a metric first, then the worst, then the oldest.
        regular.sort(key=lambda each: (each.metric is not None, each.metric or 0.0, each.time))
        room = self.max_num - (not best)
        while regular and (len(regular) > room or _size(self.root) > self.max_bytes):
            shutil.rmtree(regular.pop(0).folder)


def complete_checkpoints(root: Path) -> list[Checkpoint]:
    """The complete checkpoints in `root`, newest first."""
    found = []
    for marker in root.glob(f"*/{MARKER}"):
        try:
            found.append(Checkpoint(folder=marker.parent, **json.loads(marker.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            logger.warning("%s cannot be read (%s): its checkpoint is left out", marker, in_one_line(error))
    return sorted(found, key=lambda each: (each.rollout, each.time), reverse=True)


def find_checkpoint(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint; None where there is none. RunError names the damaged file of one that cannot be
    loaded, and the checkpoint before; OptionError says that the folder is another program's."""
    checkpoints = complete_checkpoints(root)
    if root.is_dir():
        complete = {each.folder for each in checkpoints}
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and folder not in complete and (checkpoints or not (root / "latest").exists()):
                logger.warning("the checkpoint %s was never finished: it is left out", folder)
    if not checkpoints:
        if (root / "latest").exists():
            raise OptionError(
                f"the checkpoints in {root} were not written by this trainer (none has a {MARKER}): go on with the "
                "program that wrote them, or start anew from the model it saved, in another --ckpt.path"
            )
        return None
    newest, *older = checkpoints
    if damage := newest.damage():
        whole = next((each for each in older if each.damage() is None), None)
        raise RunError(
            f"the checkpoint {newest.folder} is damaged, {damage}: "
            + (f"remove it to go on from {whole.folder.name}" if whole else "start anew in another --ckpt.path")
        )
    return newest


def leave_alone(root: Path) -> None:
    """A run that starts anew moves the checkpoints of the one before out of its way."""
    if root.exists() and any(root.iterdir()):
        aside = move_aside(root)
        logger.warning(
            "starting anew: the checkpoints of an earlier run are moved from %s to %s. To go on from them, stop this "
            "run, move them back and give --ckpt.load_enable",
            *(root, aside.name),
        )


def _size(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
