"""The rows of a plain jsonl file without the library `datasets`, which a second is spent on importing.

Plain: one file of one flat object per line, all with the same keys, and under each key texts, whole numbers, numbers
with a point or truth values, never mixed. OpenRLHF's reader has the same rows then, value by value
(tests/test_plain_rows.py); of everything else it has its own idea, and reads it (prompt_rows.py).
"""

import json
import math
import os
import re

MOST_BYTES = 2**26  # a larger file need not be in memory
_GLOB = re.compile(r"[*?\[\]{}@,]")  # a name that the reader takes for more than the name of a file
_DATE = re.compile(r"\d{4}-\d\d-\d\d")  # it may make timestamps of a column of such texts
_AGENT_TRACE = {"type", "id", "version", "cwd"}  # columns by which it knows one


def read_plain_rows(name: str) -> list[dict] | None:
    """The rows of the file `name`; None where it isn't a plain one, or where there is none."""
    if not name.endswith((".json", ".jsonl")) or _GLOB.search(name) or not os.path.isfile(name):
        return None
    if os.path.getsize(name) > MOST_BYTES:
        return None
    try:
        with open(name, encoding="utf-8", newline="\n") as file:
            rows = [json.loads(line, object_pairs_hook=_flat, parse_constant=_flat) for line in file]
        return rows if rows and _uniform(rows) else None
    except (ValueError, OSError, RecursionError):
        return None


def _flat(pairs) -> dict:
    """A JSON object. ValueError for a key that is there twice, for a value that isn't plain, and for NaN."""
    row = dict(pairs)
    if len(row) != len(pairs) or not all(map(_is_plain, row.values())):
        raise ValueError
    return row


def _is_plain(value: object) -> bool:
    if type(value) is str:
        value.encode()  # half a surrogate pair is a ValueError
        return "\0" not in value and not _DATE.match(value)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return type(value) is bool or (type(value) is float and math.isfinite(value))


def _uniform(rows: list) -> bool:
    if not isinstance(rows[0], dict) or not rows[0] or rows[0].keys() >= _AGENT_TRACE:
        return False
    types = {key: type(value) for key, value in rows[0].items()}
    return all(isinstance(row, dict) and {key: type(value) for key, value in row.items()} == types for row in rows)
