"""A plain jsonl file has the rows that OpenRLHF's reader has; what is not plain is left to that reader."""

import json
import random
from types import SimpleNamespace

import pytest

from openrlhf_apo.data.blended_rows import read_blended_rows
from openrlhf_apo.data.plain_rows import read_plain_rows

pytestmark = pytest.mark.filterwarnings("ignore")


def read(name: str) -> list[dict]:
    reader = SimpleNamespace(is_rank_0=lambda: False, print=lambda message: None)
    return list(read_blended_rows(name, None, reader, seed=1, count=10**8, split="train"))


def random_file(seed: int) -> str:
    """Columns of random kinds, with escapes, signs of other scripts, and keys in any order."""
    draw = random.Random(seed)
    texts = [
        "",
        "1",
        "12:30",
        "12-01-02",
        "é",
        "数学",
        "🙂",
        'a "b" \\frac{1}{2}\n\t',
        "\u2028",
        "null",
        "NaN",
        " 2024-01-01",
    ]
    kinds = {
        "text": lambda: "".join(draw.choices(texts, k=draw.randrange(4))),
        "int": lambda: draw.choice([0, -1, 2**53 + 1, 2**63 - 1, -(2**63), draw.randrange(100)]),
        "float": lambda: draw.choice([0.1, -0.0, 1e-320, 1e300, 2.0, draw.gauss(0, 1)]),
        "bool": lambda: draw.random() < 0.5,
    }
    columns = {f"{kind} {i}": kinds[kind] for i, kind in enumerate(draw.choices(list(kinds), k=draw.randrange(1, 6)))}
    lines = []
    for _ in range(draw.randrange(1, 40)):
        row = {name: value() for name, value in columns.items()}
        shuffled = dict(draw.sample(list(row.items()), len(row)))
        lines.append(json.dumps(shuffled, ensure_ascii=draw.random() < 0.5))
    return draw.choice(["\n", "\r\n"]).join(lines) + draw.choice(["", "\n"])


@pytest.mark.parametrize("seed", range(20))
def test_plain_rows_are_the_readers(tmp_path, seed):
    path = tmp_path / f"rows.{random.Random(seed).choice(['json', 'jsonl'])}"
    path.write_bytes(random_file(seed).encode())
    plain = read_plain_rows(str(path))
    assert plain is not None
    theirs = read(str(path))
    typed = [[{key: (type(row[key]), repr(row[key])) for key in row} for row in rows] for rows in (plain, theirs)]
    assert typed[0] == typed[1]
    assert list(plain[0]) == list(theirs[0])  # the order of columns, which an error names


NOT_PLAIN = {
    "a number with a point among whole ones": '{"a": 1}\n{"a": 1.5}\n',
    "a number among texts": '{"a": "1"}\n{"a": 1}\n',
    "null": '{"a": null}\n{"a": "x"}\n',
    "a missing key": '{"a": "x", "b": "y"}\n{"a": "x"}\n',
    "a key twice": '{"a": "x", "a": "y"}\n',
    "a list": '{"a": ["x"]}\n',
    "an object": '{"a": {"b": "x"}}\n',
    "no rows": "",
    "an array": '[{"a": "x"}, {"a": "y"}]',
    "not an object": "1\n",
    "not JSON": '{"a": "x"}\noops\n',
    "NaN": '{"a": NaN}\n',
    "a number too large": '{"a": 9223372036854775808}\n',
    "infinity": '{"a": 1e999}\n',
    "a date": '{"a": "2024-01-01"}\n{"a": "2024-01-02"}\n',
    "half a pair": '{"a": "\\ud800"}\n',
    "a zero character": '{"a": "\\u0000"}\n',
    "several lines": '{\n"a": "x"\n}\n',
    "deep": '{"a": ' + "[" * 10**5 + "]" * 10**5 + "}\n",
    "a trace of an agent": '{"type": "x", "id": "y", "version": 1, "cwd": "z"}\n',
}


@pytest.mark.parametrize("text", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_left_to_the_reader(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert read_plain_rows(str(path)) is None


def test_names_of_more_or_less_than_a_file_are_left_to_the_reader(tmp_path, monkeypatch):
    for name in ("a.jsonl", "b.jsonl", "[a].jsonl", "a.csv", "a.JSONL"):
        (tmp_path / name).write_text('{"a": "x"}\n')
    monkeypatch.chdir(tmp_path)
    assert read_plain_rows("a.jsonl") == [{"a": "x"}]
    for name in (
        "a.jsonl,b.jsonl",
        "*.jsonl",
        "[a].jsonl",
        "a.csv",
        "a.JSONL",
        "a.jsonl@folder",
        "c.jsonl",
        "hub/name",
    ):
        assert read_plain_rows(name) is None
