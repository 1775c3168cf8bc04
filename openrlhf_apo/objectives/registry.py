"""Losses by name, `--loss NAME`: those of this package, and those of your own file (`--loss_path`).

    @group_loss("mine")                              a function of log_ratio[G, P] and rewards[G, P] -> [G]
    @token_loss("mine")                              a subclass of TokenLoss
    @group_loss("mine", uses=("target", "alpha"))    what it reads is declared

A loss with settings is a dataclass. Each field that is a `setting(...)` gives it a flag `--mine.FIELD`, with its help
and its check.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from openrlhf_apo.errors import LossError
from openrlhf_apo.settings import Setting, construct, settings_of

from .token_base import Aggregation, TokenLoss
from .uses import GROUP_USES, TOKEN_USES, Use

T = TypeVar("T")  # a loss as it is written, which its decorator returns unchanged
OPENRLHF = "openrlhf"  # --loss openrlhf is OpenRLHF's own step, and no loss of this registry


@dataclass(frozen=True)
class Loss:
    """A registered loss. implementation: a function, or the class to build with the values of its settings. uses: what
    it declares (uses.py)."""

    name: str
    implementation: Any
    uses: frozenset[str]

    @property
    def settings(self) -> tuple[Setting, ...]:
        return settings_of(self.implementation) if isinstance(self.implementation, type) else ()

    def __call__(self, **settings: Any) -> Any:
        """The loss itself. Settings that are not given have their defaults; ValueError for a bad value."""
        if isinstance(self.implementation, type):
            return construct(self.implementation, **settings)
        return self.implementation

    def presets(self, max_new_tokens: int | None) -> dict[str, object]:
        """{flag: value}, the paper's settings of flags that are not the loss's own."""
        return self.implementation.presets(max_new_tokens) if self.name in TOKEN_LOSSES else {}


GROUP_LOSSES: dict[str, Loss] = {}
TOKEN_LOSSES: dict[str, Loss] = {}


def group_loss(name: str, uses: tuple[str, ...] = ("target",)) -> Callable[[T], T]:
    """Register a group loss: a function of (log_ratio[G, P], rewards[G, P], context), float64, that returns the loss
    of each group [G]; or a dataclass whose instances are such functions. uses: what it reads of the context.

    Raises LossError for a name that is taken or cannot be a flag, and for a use that does not exist.
    """
    return _register("group", name, uses, GROUP_LOSSES, GROUP_USES)


def token_loss(name: str, uses: tuple[str, ...] = ()) -> Callable[[T], T]:
    """Register a subclass of TokenLoss. uses: what it reads of the step.

    Raises LossError as `group_loss` does, and for a class that is no TokenLoss or has no `aggregation`.
    """
    register = _register("token", name, uses, TOKEN_LOSSES, TOKEN_USES)

    def checked(implementation: T) -> T:
        if not (isinstance(implementation, type) and issubclass(implementation, TokenLoss)):
            raise LossError(f"token loss {name!r} must be a class derived from TokenLoss")
        if getattr(implementation, "aggregation", None) not in get_args(Aggregation):
            raise LossError(
                f"token loss {name!r} has no aggregation: set it to one of {', '.join(get_args(Aggregation))}"
            )
        return register(implementation)

    return checked


def _register(
    kind: str, name: str, uses: tuple[str, ...], registry: dict[str, Loss], known: dict[str, Use]
) -> Callable[[T], T]:
    def register(implementation: T) -> T:
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise LossError(f"{kind} loss name {name!r}: use letters, digits and underscores")
        if name in GROUP_LOSSES or name in TOKEN_LOSSES or name == OPENRLHF:
            raise LossError(f"{kind} loss {name!r} exists already: choose another name")
        if isinstance(uses, str):
            raise LossError(f"{kind} loss {name!r}: uses must be a tuple, uses=({uses!r},)")
        for use in uses:
            if use not in known:
                raise LossError(f"{kind} loss {name!r}: uses={use!r} is not one of {', '.join(known)}")
        if isinstance(implementation, type):
            settings_of(implementation)  # TypeError for a setting that can have no flag
        registry[name] = Loss(name, implementation, frozenset(uses))
        return implementation

    return register
