"""docs/evidence.md says what its CSVs say, and those are of the cells of this repository."""

import importlib.util
import re
from pathlib import Path

import pytest

from openrlhf_apo.analysis.compare_file import load_comparison

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "evidence.md"
CELLS = sorted(PAGE.with_suffix("").glob("*.csv"))


@pytest.fixture(scope="module")
def evidence():
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "scripts" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_csvs(evidence):
    page = PAGE.read_text(encoding="utf-8")
    assert evidence.rebuilt(page) == page
    start = "<!-- cell pairs_1 grpo -->\n"
    assert evidence.rebuilt(page.replace(start, f"{start}| another | line |\n")) == page


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_a_csv_holds_the_runs_of_its_cell(path, evidence, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {(run.arm, run.seed) for run in load_comparison(f"configs/evidence/{path.stem}.yaml").runs()}
    rows = evidence.read(path.stem)
    assert {(row["arm"], row["seed"]) for row in rows} == runs
    assert len({row["steps"] for row in rows}) == 1


def test_no_csv_is_left_out_of_the_page():
    page = PAGE.read_text(encoding="utf-8")
    tables = re.findall(r"<!-- (?:rates|cell) (\w+)", page)
    for path in CELLS:
        assert any(path.stem == table or path.stem.startswith(f"{table}_") for table in tables), path.name
