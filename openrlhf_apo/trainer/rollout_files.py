"""Rollouts on disk, for `--apo.save_rollouts` and `--apo.load_rollouts`: one file each, one sample per line."""

import json
import logging
import os
from pathlib import Path

from openrlhf_apo.trainer.files import move_aside
from openrlhf_apo.trainer.run_record import read_run_record
from openrlhf_apo.trainer.samples import Sample

logger = logging.getLogger(__name__)


class RolloutFiles:
    """`rollout_00001.jsonl` and so on in a directory; a file appears whole or not at all."""

    def __init__(self, directory: str):
        self.directory = Path(directory)

    def __len__(self) -> int:
        return len(list(self.directory.glob("rollout_*.jsonl")))

    def rollouts(self) -> list[int]:
        """Their numbers, of files that hold samples: an empty one is of a rollout whose groups were all dropped."""
        paths = [path for path in self.directory.glob("rollout_*.jsonl") if path.stat().st_size]
        return sorted(int(path.stem.removeprefix("rollout_")) for path in paths)

    def sizes(self) -> list[int]:
        """Of the files, bytes."""
        return [path.stat().st_size for path in sorted(self.directory.glob("rollout_*.jsonl"))]

    def leave_alone(self) -> None:
        """A run that starts anew moves the files of the one before out of its way, as files.py does."""
        aside = [move_aside(path) for path in sorted(self.directory.glob("rollout_*.jsonl"))]
        if aside:
            logger.warning("%s holds rollouts of an earlier run: moved to %s, ...", self.directory, aside[0].name)

    def write(self, rollout: int, samples: list[Sample]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path(rollout)
        partial = path.with_suffix(".tmp")
        with open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(sample.to_dict(), allow_nan=False) + "\n" for sample in samples)
        os.replace(partial, path)

    def read(self, rollout: int) -> list[Sample]:
        """The samples of a rollout (from 1). Raises ValueError naming the file for anything else than samples."""
        path = self._path(rollout)
        try:
            with open(path, encoding="utf-8") as file:
                samples = [Sample(**json.loads(line)) for line in file]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a saved rollout: {error}") from None
        for sample in samples:
            if len(sample.rollout_log_probs) != len(sample.response_ids) or not isinstance(sample.reward, int | float):
                raise ValueError(f"{path}: a sample of group {sample.group_id} has no reward or no log-probs")
            if sample.own is not None and len(sample.own) != len(sample.response_ids):
                raise ValueError(f"{path}: `own` of a sample of group {sample.group_id} is not one per response token")
        return samples

    def _path(self, rollout: int) -> Path:
        return self.directory / f"rollout_{rollout:05d}.jsonl"


def saved_rollouts(directory: Path) -> RolloutFiles | None:
    """Those in `directory` itself, or those of the run whose output directory it is: where its run.json says that
    --apo.save_rollouts wrote them, or in its `rollouts`. None where no such place has any."""
    recorded = read_run_record(directory).get("settings", {}).get("apo.save_rollouts")
    places = [str(directory), *([recorded] if recorded else []), str(directory / "rollouts")]
    return next((files for files in map(RolloutFiles, places) if files.rollouts()), None)
