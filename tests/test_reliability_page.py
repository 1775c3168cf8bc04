"""Every row of docs/reliability.md and docs/known_failures.md names a test that is there, and there are enough."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


def rows_of(page: str) -> list[tuple[str, str, str]]:
    """(first column, file, test) of the rows of its tables that end with a test."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(r"^\| (.+?) \| .+ \| `(\w+\.py)::(\w+)` \|$", text, re.MULTILINE)


@pytest.mark.parametrize("page, least", [("reliability.md", 45), ("known_failures.md", 35)])
def test_every_row_of_the_page_has_its_test(page, least):
    rows = rows_of(page)
    assert len({first for first, _, _ in rows}) == len(rows) >= least
    for first, name, test in rows:
        (path,) = [*TESTS.glob(name), *TESTS.glob(f"faults/{name}")]
        assert f"def {test}(" in path.read_text(encoding="utf-8"), first


def test_no_row_of_the_known_failures_goes_without_a_test_and_no_test_without_a_row():
    lines = (DOCS / "known_failures.md").read_text(encoding="utf-8").splitlines()
    data = [line for line in lines if line.startswith("| ") and not line.startswith(("| thread |", "| --- |"))]
    rows = rows_of("known_failures.md")
    assert len(rows) == len(data)
    here = (TESTS / "faults" / "test_known_failures.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^def (test_\w+)\(", here, re.MULTILINE)) <= {test for _, _, test in rows}
