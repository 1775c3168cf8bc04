"""One run at a time in a directory: two would write into each other's metrics and remove each other's checkpoints."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from openrlhf_apo.errors import OptionError

NAME = ".lock"


class OutputLock:
    """Holds a directory until it is closed or the process ends, however it does. made: which of it and of those above
    it were made for it; they go again where nothing came into them."""

    def __init__(self, file: TextIO, made: list[Path]):
        self.file, self.made = file, made

    def close(self) -> None:
        if self.made and os.listdir(self.made[0]) == [NAME]:
            os.unlink(self.file.name)
            with suppress(OSError):  # of the first that is not empty
                for directory in self.made:
                    directory.rmdir()
        self.file.close()


def lock_outputs(directories: dict[str, str]) -> list[OutputLock]:
    """{flag: directory}, made where they are missing. Raises OptionError for one that another run holds or that cannot
    be written."""
    locks: list[OutputLock] = []
    for flag, directory in {os.path.realpath(path): (flag, path) for flag, path in directories.items()}.values():
        path = Path(directory)
        made = [each for each in (path, *path.parents) if not each.exists()]  # the deepest first
        try:
            os.makedirs(directory, exist_ok=True)
            file = open(path / NAME, "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise OptionError(f"{flag} {directory}: {error.strerror}; give a directory that can be written") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise OptionError(
                f"{flag} {directory} is in use by another run (process {file.read().strip()}): wait for it to end, or "
                "give another directory"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        locks.append(OutputLock(file, made))
    return locks
