"""jsonl files, and output folders that are either finished or made anew."""

import hashlib
import json
from pathlib import Path

DONE = "done.json"


def read_jsonl(path) -> list[dict]:
    """The rows of a jsonl file. ValueError, in one line, when it is missing, empty or not jsonl."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object; give one object per line")
            rows.append(row)
    if not rows:
        raise ValueError(f"no rows in {path}")
    return rows


def write_jsonl(path, rows):
    """One JSON object per line; makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_finished(folder, settings: dict) -> bool:
    """Whether `folder` was finished under the same settings and still holds every file, byte for byte."""
    folder = Path(folder)
    try:
        done = json.loads((folder / DONE).read_text())
        return done["settings"] == settings and all(
            digest((folder / name).read_bytes()) == sha256 for name, sha256 in done["files"].items()
        )
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def mark_finished(folder, settings: dict):
    """Write done.json, the last file of a folder: its settings and the hash of each other file in it."""
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): digest(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / DONE).write_text(json.dumps({"settings": settings, "files": files}, indent=1))
