"""What is said of the package beside its code agrees with it."""

import re
import tomllib
from pathlib import Path

import yaml

from openrlhf_apo import __version__
from openrlhf_apo.options.flags import PACKAGES
from openrlhf_apo.options.openrlhf_flags import FLAGS

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


def test_extras_are_pinned_and_are_what_the_flags_need():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    needed = {flag.package for name, flag in FLAGS.items() if name.startswith("logger.") and flag.package}
    assert set(extras) == needed | set(PACKAGES.values())
    for name, (requirement,) in extras.items():
        assert re.fullmatch(rf"{name}==[\d.]+", requirement)
    pinned = (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8")
    assert f"{extras['wandb'][0]} " in pinned and f"{extras['tensorboard'][0]} " in pinned
