"""docs/reliability.md names a test that is there for every fault, and there are enough of them."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "reliability.md"


def test_every_fault_of_the_page_has_its_test():
    rows = re.findall(r"^\| (.+?) \| .+ \| `(\w+\.py)::(\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len({fault for fault, _, _ in rows}) == len(rows) >= 45
    for fault, name, test in rows:
        (path,) = [*TESTS.glob(name), *TESTS.glob(f"faults/{name}")]
        assert f"def {test}(" in path.read_text(encoding="utf-8"), fault
