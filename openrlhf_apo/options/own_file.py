"""A Python file with losses and alpha controllers of your own, `--loss_path FILE.py`."""

import importlib.util
import os
import sys
from dataclasses import dataclass

from openrlhf_apo.alpha import CONTROLLERS
from openrlhf_apo.errors import LossError, in_one_line
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.owners import owners
from openrlhf_apo.options.upstream import upstream_parser

REGISTRIES = (GROUP_LOSSES, TOKEN_LOSSES, CONTROLLERS)
MODULE = "openrlhf_apo_own_file"


@dataclass(frozen=True)
class OwnFile:
    """The names that a file registered."""

    losses: tuple[str, ...] = ()
    controllers: tuple[str, ...] = ()


_LOADED: dict[str, OwnFile] = {}


def load_own_file(path: str) -> OwnFile:
    """Run a Python file; its losses and controllers are then registered like the built-in ones.

    A file that was loaded before is not run again. LossError, one line, for a file that cannot be run, registers
    nothing or takes a name that is taken; nothing of it stays registered.
    """
    path = os.path.realpath(path)
    if path in _LOADED:
        return _LOADED[path]
    if not path.endswith(".py"):
        raise LossError(f"{path} is not a Python file (.py)")
    before = [set(registry) for registry in REGISTRIES]
    taken = _flag_prefixes()
    try:
        _run(path)
        group, token, controllers = (
            [name for name in registry if name not in old] for registry, old in zip(REGISTRIES, before, strict=True)
        )
        for name in [*group, *token, *controllers]:
            if name in taken:
                raise LossError(f"flags --{name}.* exist already: choose another name than {name!r}")
            taken.add(name)
    except (Exception, SystemExit) as error:  # whatever your file raises
        for registry, old in zip(REGISTRIES, before, strict=True):
            for name in set(registry) - old:
                del registry[name]
        raise LossError(f"{path} cannot be loaded: {in_one_line(error)}") from None
    own = OwnFile((*group, *token), tuple(controllers))
    if own == OwnFile():
        raise LossError(
            f'{path} registers no loss and no controller: decorate one with @group_loss("name"), @token_loss("name") '
            'or @alpha_controller("name")'
        )
    _LOADED[path] = own
    return own


def _run(path: str) -> None:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses look up string annotations there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[MODULE]  # so that what is sent to other processes travels with its code


def _flag_prefixes() -> set[str]:
    """PREFIX of all flags --PREFIX.NAME there are."""
    options = (option for action in upstream_parser()._actions for option in action.option_strings if "." in option)
    return {option.removeprefix("--").partition(".")[0] for option in options} | {owner.prefix for owner in owners()}
