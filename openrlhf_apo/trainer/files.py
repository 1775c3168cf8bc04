"""Files of a run that appear whole or not at all, and those of the run before, which stay."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """On disk when this returns; a crash leaves what was there before."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_aside(path: Path) -> Path:
    """Rename to NAME.1, or .2 and so on when that is taken; the new path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)
