"""One run at a time in a directory: two would write into each other's metrics and remove each other's checkpoints."""

import fcntl
import os
from typing import TextIO

from openrlhf_apo.errors import OptionError

NAME = ".lock"


def lock_outputs(directories: dict[str, str]) -> list[TextIO]:
    """{flag: directory}, made where they are missing. They stay locked while the returned files are open, or until
    this process ends, however it does. Raises OptionError for one that another run holds or that cannot be written."""
    files: list[TextIO] = []
    for flag, directory in directories.items():
        try:
            os.makedirs(directory, exist_ok=True)
            file = open(os.path.join(directory, NAME), "a+", encoding="utf-8")  # noqa: SIM115
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
        files.append(file)
    return files
