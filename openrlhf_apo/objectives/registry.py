"""Losses by name, `--loss NAME`: those of this package, and those of your own file (`--loss_path`).

    @group_loss("mine")                              a function of log_ratio[G, P] and rewards[G, P] -> [G]
    @token_loss("mine")                              a TokenLoss
    @group_loss("mine", uses=("target", "alpha"))    what it reads is declared

A loss with settings is a dataclass whose fields are `setting(...)`: flags `--mine.FIELD`, `--help` and checks follow.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from openrlhf_apo.errors import LossError
from openrlhf_apo.settings import Setting, settings_of

T = TypeVar("T")

OPENRLHF = "openrlhf"  # --loss openrlhf is OpenRLHF's own step, and no loss of this registry

# What a group loss may read of its context, and what a token loss may ask of the step, beside what every loss has.
GROUP_USES = {
    "target": "context.log_q (--apo.beta_r)",
    "alpha": "context.alpha (--alpha_mode)",
    "weight_clip": "context.weight_clip (--apo.weight_clip)",
}
TOKEN_USES = {
    "entropy": "step.entropies: one more forward in the first optimizer step of a rollout",
    "max_length": "step.max_length (--rollout.max_new_tokens)",
}


@dataclass(frozen=True)
class Loss:
    """A registered loss. `implementation`: a function, or the class to build with the values of its settings."""

    name: str
    implementation: Any
    uses: frozenset[str]

    @property
    def settings(self) -> list[Setting]:
        owner = self.implementation
        return settings_of(owner) if isinstance(owner, type) and is_dataclass(owner) else []

    def __call__(self, **settings: Any) -> Any:
        """The loss itself, with values for its settings."""
        return self.implementation(**settings) if isinstance(self.implementation, type) else self.implementation

    def presets(self, max_new_tokens: int | None) -> dict[str, object]:
        """{flag: value}, the paper's settings of flags that are not the loss's own."""
        return self.implementation.presets(max_new_tokens) if self.name in TOKEN_LOSSES else {}


GROUP_LOSSES: dict[str, Loss] = {}
TOKEN_LOSSES: dict[str, Loss] = {}
_LOADED: dict[str, list[str]] = {}


def group_loss(name: str, uses: tuple[str, ...] = ("target",)) -> Callable[[T], T]:
    """Register a function of (log_ratio[G, P], rewards[G, P], context), float64, that returns the loss of each group
    [G], or a dataclass whose instances are such functions. `uses`: what it reads of the context (GROUP_USES).

    Raises LossError for a name that is taken, or that no command line could hold.
    """
    return _register("group", name, uses, GROUP_LOSSES, GROUP_USES)


def token_loss(name: str, uses: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a subclass of TokenLoss. `uses`: what it asks of the step (TOKEN_USES). Raises LossError as above."""
    return _register("token", name, uses, TOKEN_LOSSES, TOKEN_USES)


def _register(
    kind: str, name: str, uses: tuple[str, ...], registry: dict[str, Loss], known: dict[str, str]
) -> Callable[[T], T]:
    def register(implementation: T) -> T:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise LossError(f"{kind} loss name {name!r}: use letters, digits and underscores")
        if name in GROUP_LOSSES or name in TOKEN_LOSSES or name == OPENRLHF:
            raise LossError(f"{kind} loss {name!r} exists already: choose another name")
        for use in uses:
            if use not in known:
                raise LossError(f"{kind} loss {name!r}: uses={use!r} is not one of {', '.join(known)}")
        if isinstance(implementation, type) and is_dataclass(implementation):
            settings_of(implementation)  # a setting of a type that no flag can have is a TypeError here
        registry[name] = Loss(name, implementation, frozenset(uses))
        return implementation

    return register


def load_losses(path: str) -> list[str]:
    """Run a Python file and return the names of the losses it registered.

    A file that was loaded before is not run again. Raises LossError in one line when it cannot be run or registers
    none.
    """
    path = os.path.realpath(path)
    if path in _LOADED:
        return _LOADED[path]
    if not path.endswith(".py"):
        raise LossError(f"{path} is not a Python file (.py)")
    before = {*GROUP_LOSSES, *TOKEN_LOSSES}
    try:
        # Not entered in sys.modules: what is sent to other processes then travels with its code.
        spec = importlib.util.spec_from_file_location("openrlhf_apo_user_loss", path)
        assert spec is not None and spec.loader is not None  # it ends in .py
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        for registry in (GROUP_LOSSES, TOKEN_LOSSES):
            for name in set(registry) - before:
                del registry[name]
        message = str(error).splitlines()[0] if str(error) else ""
        raise LossError(f"{path} cannot be loaded: {type(error).__name__}: {message}") from None
    names = [name for name in (*GROUP_LOSSES, *TOKEN_LOSSES) if name not in before]
    if not names:
        raise LossError(f'{path} registers no loss: decorate one with @group_loss("name") or @token_loss("name")')
    _LOADED[path] = names
    return names
