"""Imports go one way: from the commands down to the maths, and the maths needs torch alone."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "openrlhf_apo"

# From bottom to top: what each part may import of the others, also inside functions.
MAY_IMPORT = {
    "settings": set(),
    "errors": set(),
    "imports": set(),
    "objectives": {"settings", "errors"},
    "alpha": {"settings", "errors", "objectives"},
    "rewards": {"settings", "errors"},
    "trainer": {"settings", "errors", "objectives", "alpha", "rewards"},
    "cpu": {"errors"},
    "ranks": {"errors", "objectives", "trainer", "cpu"},
    "data": {"errors", "rewards", "trainer"},
    "embedded": {"errors", "trainer", "cpu", "ranks", "data"},
    "options": {"settings", "errors", "objectives", "alpha", "trainer", "cpu"},
    # as embedded: not options, a run comes as a plan
    "cluster": {"errors", "imports", "trainer", "cpu", "ranks", "data"},
    "analysis": {"settings", "errors", "objectives", "alpha", "trainer", "cpu", "options"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["from_python"] = {"errors", "options", "embedded", "trainer"}  # beside cli: the same, called from Python
MAY_IMPORT["__init__"] = {"from_python"}  # in a function
MATHS = ("objectives", "alpha")
# What a part loads, through others too, none of: slow libraries, which a run's own processes want, stay in functions.
RUNTIMES = {"ray", "deepspeed", "vllm"}
LOADS_NONE_OF = {"embedded": RUNTIMES} | {
    part: RUNTIMES | {"openrlhf", "transformers"}
    for part in ("settings", "errors", *MATHS, "trainer", "options", "analysis", "cli")
}


@dataclass(frozen=True)
class Import:
    module: str  # whole name
    in_function: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(name: str) -> list[Import]:
    """What a module imports; a name imported from a package of ours is the submodule where there is one."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                continue
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, in_function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package.split(".")[: package.count(".") + 2 - child.level] if child.level else []
                source = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    whole = f"{source}.{alias.name}"
                    found.append(Import(whole if whole in FILES else source, in_function))
            else:
                visit(child, in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(TREES[name], in_function=False)
    return found


IMPORTS = {name: imports_of(name) for name in FILES}


def part_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def loaded_with(name: str) -> set[str]:
    """Top-level names of all that is imported when a module is, through our other modules and their packages too."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        module = queue.pop()
        if module not in seen:
            seen.add(module)
            if module in FILES:
                queue += [each.module for each in IMPORTS[module] if not each.in_function]
                queue += [module.rpartition(".")[0]] if "." in module else []
    return {module.partition(".")[0] for module in seen}


def test_a_part_imports_only_what_is_below_it():
    upwards = [
        f"{name} imports {each.module}"
        for name in FILES
        for each in IMPORTS[name]
        if each.top == PACKAGE and part_of(each.module) not in MAY_IMPORT[part_of(name)] | {part_of(name)}
    ]
    assert upwards == []


def test_below_is_one_way():
    parts = list(MAY_IMPORT)
    for position, part in enumerate(parts):
        assert MAY_IMPORT[part] <= set(parts[:position]), part


def test_no_module_imports_itself_through_others():
    graph = {name: {each.module for each in IMPORTS[name] if each.module in FILES} for name in FILES}
    TopologicalSorter(graph).prepare()  # CycleError shows the circle


def test_the_maths_needs_torch_alone():
    needs = {each.top for name in FILES if part_of(name) in MATHS for each in IMPORTS[name]}
    assert needs - sys.stdlib_module_names == {"torch", PACKAGE}


def test_slow_libraries_are_loaded_where_they_are_wanted():
    loaded = {name: loaded_with(name) & LOADS_NONE_OF.get(part_of(name), set()) for name in FILES}
    assert {name: found for name, found in loaded.items() if found} == {}


@pytest.mark.parametrize("libraries", [RUNTIMES, LOADS_NONE_OF["cli"]], ids=["embedded", "rest"])
def test_python_agrees(libraries):
    names = [name for name in FILES if LOADS_NONE_OF.get(part_of(name)) == libraries]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert {module.partition(".")[0] for module in result.stdout.split()} & libraries == set()


def test_an_embedded_run_needs_no_more_than_it_uses(flags, tmp_path):
    """From prompts in a plain file to the saved model."""
    math = [flag.replace("--reward.remote_url", "--reward") for flag in flags]
    math[math.index("--reward") + 1] = "math_verify"
    out = [*("--ckpt.output_dir", str(tmp_path), "--ckpt.path", str(tmp_path / "ckpt")), "--data.max_samples", "8"]
    unwanted = {*RUNTIMES, "datasets", "pandas", "pyarrow", "math_verify"}
    code = (
        "import sys\nfrom openrlhf_apo.cli.train_apo_ray import main\n"
        f"assert main({[*math, *out]}) == 0\nassert not {unwanted} & set(sys.modules), {unwanted} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, (tmp_path / "run.log").read_text()[-2000:]
    assert (tmp_path / "model.safetensors").exists()


def patches_in(tree: ast.Module) -> list[str]:
    """Statements that write into a module of another package, or into sys.modules."""
    foreign = {"sys.modules"}  # names of modules that are not ours, nor Python's
    ours = {*sys.stdlib_module_names, PACKAGE}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound = [(alias.asname or alias.name.partition(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound = [(alias.asname or alias.name, node.module) for alias in node.names]
        elif isinstance(node, ast.Assign) and "import_module(" in ast.unparse(node.value):
            bound = [(ast.unparse(target), "") for target in node.targets]
        else:
            continue
        foreign |= {name for name, source in bound if source.partition(".")[0] not in ours}
    found = []
    for node in ast.walk(tree):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        owners = [each.value for each in targets if isinstance(each, ast.Attribute | ast.Subscript)]
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            owners.append(node.args[0])
        written = {ast.unparse(owner) for owner in owners}
        if written & foreign or {owner.partition(".")[0] for owner in written} & foreign:
            found.append(ast.unparse(node))
    return found


def test_upstream_is_patched_in_one_place():
    patched = {name: found for name in FILES if (found := patches_in(TREES[name]))}
    for name in ("options.own_file", "rewards.agent_file", "rewards.isolated"):  # your file's module: nobody else's
        assert all("sys.modules[" in statement for statement in patched.pop(f"{PACKAGE}.{name}"))
    assert set(patched) == {f"{PACKAGE}.cpu.patches"}, patched


def test_no_import_is_late():
    files = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".")]
    assert [path for path in files if re.search(r"#\s*noqa:[^\n]*E402", path.read_text(encoding="utf-8"))] == []


def test_the_import_beside_rays_start_asks_no_finder_that_imports():
    """cluster/start.py says what for: Ray's fork and such a finder would wait for each other."""
    code = "import sys, openrlhf_apo.cluster.start; sys.exit('distutils' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_table_of_contributing_names_what_comes_from_outside():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = {
        part: outside.lower() for part, outside in re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", text, re.MULTILINE)
    }
    for name in TREES:
        part = name.split(".")[1] if "." in name else name
        if part in table:
            for each in imports_of(name):
                if each.top not in sys.stdlib_module_names and each.top != PACKAGE:
                    assert each.top.replace("math_verify", "math-verify") in table[part], f"{name} imports {each.top}"
