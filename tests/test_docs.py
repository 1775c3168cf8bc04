"""Every command in the README and docs/ is real: scripts exist and parse, flags are accepted, links lead somewhere."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import create_autospec

import pandas
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_apo import from_python
from openrlhf_apo.analysis.compare_file import load_comparison
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.own_file import load_own_file
from openrlhf_apo.options.resolve import _read_config, make_parser
from openrlhf_apo.settings import setting
from openrlhf_apo.trainer.metrics import MetricsFile
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample

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
        for config in args.config or ():
            _read_config(parser, str(ROOT / config))


COMPARISONS = sorted(path for folder in ("compare", "evidence") for path in (ROOT / "configs" / folder).glob("*.yaml"))
CONFIGURATIONS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(COMPARISONS))


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda path: path.name)
def test_configurations_hold_known_flags(config):
    assert _read_config(make_parser(), str(config))


@pytest.mark.parametrize("config", COMPARISONS, ids=lambda path: path.name)
def test_comparisons_are_prepared_by_real_commands(config, monkeypatch):
    """Their arms: test_compare.py."""
    monkeypatch.chdir(ROOT)
    for python, dash_m, module, *_ in load_comparison(config).prepare:
        assert (python, dash_m) == ("python", "-m") and find_spec(module)


@pytest.mark.parametrize("loss", [*GROUP_LOSSES, *TOKEN_LOSSES])
def test_every_loss_has_its_file_and_its_section(loss):
    assert f"\n### {loss}\n" in (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    docstring = (ROOT / "openrlhf_apo" / "objectives" / f"{loss}.py").read_text(encoding="utf-8").split('"""')[1]
    assert "Reference: " in docstring


def test_every_picture_is_made_by_one_script():
    script = (ROOT / "scripts" / "figures.sh").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").rglob("*.png") if f"docs/{path.name}" not in script] == []


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


def python_blocks() -> list:
    """Of the README and docs/; those of CONTRIBUTING.md are in test_extending.py."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        found += [pytest.param(block, id=f"{page.name}-{i}") for i, block in enumerate(blocks)]
    return found


@pytest.fixture(scope="module")
def workplace(tiny_model, tmp_path_factory) -> Path:
    """A folder with the files that the pages' examples read."""
    here = tmp_path_factory.mktemp("docs")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    for run in ("tiny_seed1", "a"):
        shutil.copytree(tiny_model, here / "runs" / run)
        tokenizer.save_pretrained(here / "runs" / run)
        MetricsFile(here / "runs" / run / "metrics.jsonl").write({"step": 1, "reward_mean": 0.5})
    RolloutFiles(str(here / "runs" / "a" / "rollouts")).write(
        1, [Sample(0, "1+1=", "2", "", [1], [2], "2", [-1.0], False, 1.0)]
    )
    checkpoint = here / "runs" / "a" / "ckpt" / "_actor" / "best_global_step30" / "embedded.pt"
    checkpoint.parent.mkdir(parents=True)
    weights = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    torch.save({"backend": {"policy": weights}}, checkpoint)
    question = {"Body": "Tom has 1 pen.", "Question": "How many?", "Answer": 1.0, "Equation": "1"}
    (here / "SVAMP.json").write_text(json.dumps([question]))
    row = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "data_source": "sums",
        "reward_model": {"ground_truth": "2"},
    }
    pandas.DataFrame([row]).to_parquet(here / "train.parquet")
    (here / "my_trl_rewards.py").write_text(
        "accuracy = brevity = lambda completions, solution, **kwargs: [float(completions == solution)]\n"
    )
    (here / "my_verl_reward.py").write_text("def compute_score(source, answer, label): return answer == label\n")
    return here


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", python_blocks())
def test_python_of_the_pages_runs(block, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(workplace)
    monkeypatch.setattr(from_python, "train", create_autospec(from_python.train))  # a run; its arguments are checked
    # What the text around a block has introduced. dataclasses ask for the module that they stand in.
    names = {"rows": [], "reward": lambda prompt, response, label: 1.0, "setting": setting, "__name__": __name__}
    exec(textwrap.dedent(block), names)


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
