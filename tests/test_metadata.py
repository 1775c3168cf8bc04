"""What is said of the package beside its code agrees with it."""

from pathlib import Path

import yaml

from openrlhf_apo import __version__

ROOT = Path(__file__).parents[1]


def test_the_changelog_and_the_citation_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{__version__}] - {citation['date-released']}\n" in changelog


def test_the_hooks_are_the_style_checks_of_the_test_script():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    script = (ROOT / "tests" / "run.sh").read_text(encoding="utf-8")
    checks = [hook["entry"].removesuffix(" --force-exclude") for hook in hooks]
    assert checks == [".venv/bin/ruff check", ".venv/bin/ruff format"]
    assert all(check in script for check in checks)
