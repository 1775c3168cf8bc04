"""OpenRLHF's own command line, taken from its source.

openrlhf 0.11.2 builds its parser and checks its arguments inside `if __name__ == "__main__":` of
cli/train_ppo_ray.py, where nothing can be imported from. Its statements are executed here instead of being copied,
so that every flag, default and check is OpenRLHF's; tests/test_patches.py fails when the file no longer has this form.
One import is left out: of openrlhf.utils.config, a file of its own, whose package imports transformers and takes 2 s.
"""

import argparse
import ast
import importlib.util
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace

IMPORT = "from openrlhf.utils.config import hierarchize"


@cache
def _main_block() -> tuple[CodeType, CodeType]:
    """The statements before `args = parser.parse_args()`, and those after it without IMPORT and the final
    `train(args)`."""
    source = importlib.util.find_spec("openrlhf.cli.train_ppo_ray").origin
    with open(source, encoding="utf-8") as file:
        module = ast.parse(file.read(), source)
    body = next(node.body for node in module.body if isinstance(node, ast.If))
    index = next(i for i, node in enumerate(body) if ast.unparse(node) == "args = parser.parse_args()")
    assert ast.unparse(body[-1]) == "train(args)"
    after = [node for node in body[index + 1 : -1] if ast.unparse(node) != IMPORT]
    assert len(body) == index + 1 + len(after) + 2
    parts = (body[:index], after)
    return tuple(compile(ast.Module(part, type_ignores=[]), "openrlhf/cli/train_ppo_ray.py", "exec") for part in parts)


@cache
def _hierarchize() -> Callable:
    package = Path(importlib.util.find_spec("openrlhf").origin).parent
    spec = importlib.util.spec_from_file_location("openrlhf_utils_config", package / "utils" / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.hierarchize


def upstream_parser() -> argparse.ArgumentParser:
    """The parser of `openrlhf.cli.train_ppo_ray`, with every one of its flags."""
    before, _ = _main_block()
    names = {"argparse": argparse, "datetime": datetime}
    exec(before, names)
    return names["parser"]


def upstream_checks(args: argparse.Namespace) -> tuple[SimpleNamespace, list[str]]:
    """What OpenRLHF does with the parsed flat arguments: nested namespaces, derived values, assertions. -> the
    settings, and what it printed on the way.

    Raises AssertionError with OpenRLHF's own message.
    """
    _, after = _main_block()
    said: list[str] = []
    names = {"args": args, "hierarchize": _hierarchize()}
    names["print"] = lambda *message: said.append(" ".join(map(str, message)))
    exec(after, names)
    return names["args"], said
