"""Every command in the README and docs/ is real: scripts exist and parse, flags are accepted, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from openrlhf_apo.analysis.compare_file import load_comparison
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.own_file import load_own_file
from openrlhf_apo.options.resolve import _read_config, make_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    found.append((page.name, line.strip()))
    return found


@cache
def usage_of(*program: str) -> str:
    usage = subprocess.run([sys.executable, *program], capture_output=True, text=True)
    assert usage.returncode == 0, usage.stderr
    return usage.stdout


@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize("page, command", commands(), ids=lambda value: value[:60])
def test_documented_command_is_accepted(page, command):
    words = [word for word in shlex.split(command, comments=True)]
    while "=" in words[0]:  # environment overrides
        words.pop(0)
    if words[0] == "bash":
        script = ROOT / words[1]
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        arguments = words[2:]
        is_trainer = "train_apo_ray" in script.read_text()
    else:
        assert words[0].endswith("python"), command
        program, arguments = (words[1:3], words[3:]) if words[1] == "-m" else ([str(ROOT / words[1])], words[2:])
        is_trainer = program[-1] == "openrlhf_apo.cli.train_apo_ray"
        own = []
        if "--loss_path" in arguments:  # the flags it brings are in --help, too
            own = ["--loss_path", str(ROOT / arguments[arguments.index("--loss_path") + 1])]
            load_own_file(own[1])
        usage = usage_of(*program, *own, "--help", *(["all"] if is_trainer else []))
        assert [w for w in arguments if w.startswith("--") and w.split("=")[0] not in usage] == []
    if is_trainer:
        parser = make_parser()
        args = parser.parse_args(arguments)
        if args.config:
            _read_config(parser, str(ROOT / args.config))


COMPARISONS = sorted((ROOT / "configs" / "compare").glob("*.yaml"))
CONFIGURATIONS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(COMPARISONS))


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_hold_known_flags(config):
    assert _read_config(make_parser(), str(config))


@pytest.mark.parametrize("config", COMPARISONS, ids=lambda path: path.name)
def test_comparisons_hold_known_flags_and_real_commands(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison = load_comparison(config)
    for words in comparison.arms.values():
        assert make_parser().parse_args(words).loss
    for python, dash_m, module, *_ in comparison.prepare:
        assert (python, dash_m) == ("python", "-m") and find_spec(module)


@pytest.mark.parametrize("loss", [*GROUP_LOSSES, *TOKEN_LOSSES])
def test_every_loss_has_its_file_and_its_section(loss):
    assert f"\n### {loss}\n" in (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    docstring = (ROOT / "openrlhf_apo" / "objectives" / f"{loss}.py").read_text(encoding="utf-8").split('"""')[1]
    assert "Reference: " in docstring


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def names_in(nav) -> list[str]:
    """The files of a `nav` of mkdocs.yml, whose entries are {title: file or entries}."""
    if isinstance(nav, str):
        return [nav]
    return [name for entry in nav for name in names_in(list(entry.values())[0])]


def test_every_page_of_the_site_is_in_its_navigation_once():
    nav = names_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))


REWARDS = [  # of docs/rewards.md, in its order: (answer, label, reward)
    [("a yes<|im_end|>", "", 1), ("no<|im_end|>", "", 0)],
    [("It is 1,234.<|im_end|>", "1234", 1), ("I do not know", "3", 0)],
    [(r"\boxed{7}" + 391 * " ", "7", 1), ("7<|im_end|>", "7", 0)],
    [
        ('{"name": 1}<|im_end|>', {"kind": "json", "answer": "name"}, 1),
        ("{", {"kind": "json", "answer": "name"}, 0),
        ("a b c<|im_end|>", {"kind": "words", "answer": "2"}, 0),
    ],
    [
        ("```python\ndef add(a, b):\n    return a + b\n```<|im_end|>", "assert add(2, 3) == 5", 1),
        ("```python\nexit()\n```", "1", 0),
    ],
]


@pytest.mark.parametrize("number", range(len(REWARDS)))
def test_the_rewards_of_the_page_score(number):
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == len(REWARDS)
    names: dict = {}
    exec(blocks[number], names)
    for answer, label, reward in REWARDS[number]:
        assert names["reward_func"](["Well? " + answer], ["Well? "], [label])["rewards"] == [reward]


@pytest.mark.parametrize("script", sorted([*ROOT.glob("*/*.sh"), *ROOT.glob("examples/scripts/*.sh")]), ids=str)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_the_gpu_recipe_stops_without_a_gpu_and_names_the_cpu_script():
    script = ROOT / "examples" / "scripts" / "train_apo_qwen3.sh"
    result = subprocess.run(
        ["bash", script], capture_output=True, text=True, env={"NUM_GPUS": "0", "PATH": "/usr/bin:/bin"}
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "train_apo_tiny_cpu.sh" in result.stderr
