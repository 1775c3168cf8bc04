"""Settings that are stated once, where they are used: a dataclass field with its default, range, help and flag.

    @token_loss("bapo")
    @dataclass(eq=False)
    class Bapo(TokenLoss):
        rho: float = setting(0.5, "least share of positive samples in the surrogate", within="(0, 1)")

From this one line come the flag `--bapo.rho`, its `--help`, its check, the loss built with its value, the refusal of
the flag beside another loss (options/owners.py), and its row in docs/openrlhf_flags.md. Standard library only.
"""

import math
import typing
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One field of an owner (a loss, a controller, ...), and what the command line needs to know of it."""

    name: str  # of the field
    default: object
    help: str
    type: type  # of one value; bool is a switch
    count: int | None  # how many values the flag takes; None for one
    optional: bool  # whether None is a value
    within: str | None  # the interval of each value, as in a textbook: "(0, 1]"
    choices: tuple[str, ...] | None
    flag: str | None  # its whole name, where that is not PREFIX.FIELD; one of OpenRLHF's, or shared with others
    part: int | None  # which of the flag's values the field is, where one flag sets several fields
    needs: tuple[str, tuple] | None  # (field of the same owner, its values) without which this one has no effect
    uses: str | None  # what the loss must declare (`uses=`) for this setting to have an effect


def setting(
    default: Any,
    help: str,
    *,
    within: str | None = None,
    flag: str | None = None,
    part: int | None = None,
    needs: tuple[str, tuple] | None = None,
    uses: str | None = None,
) -> Any:
    """The default of a dataclass field that is a setting; the arguments are those of `Setting`.

    Types: float, int, str, bool, Literal of strings, tuple of equal numbers, and any of these `| None`.
    """
    stated = {"help": help, "within": within, "flag": flag, "part": part, "needs": needs, "uses": uses}
    return field(default=default, metadata={"setting": stated})


@cache  # string annotations of your own file can be read only while it is loaded (options/own_file.py)
def settings_of(owner: type) -> tuple[Setting, ...]:
    """The settings among the fields of a dataclass, in order; a class that is no dataclass has none.

    A subclass may state another default, `eps_high: float = 0.28`. It inherits range, help and flag. TypeError for a
    setting that would be lost, or that can have no flag.
    """
    for base in owner.__mro__:
        for name, value in vars(base).items():
            if isinstance(value, Field):
                raise TypeError(f"{base.__name__}.{name}: put @dataclass(eq=False) right above class {base.__name__}")
    if not is_dataclass(owner):
        return ()
    hints = typing.get_type_hints(owner)
    found = []
    for item in fields(owner):
        stated = _stated(owner, item.name)
        if stated is not None:
            if item.default is MISSING:
                raise TypeError(f"{owner.__name__}.{item.name}: a setting needs a default")
            if getattr(owner, item.name) is not item.default:
                raise TypeError(f"{owner.__name__}.{item.name}: a default needs its type, {item.name}: TYPE = VALUE")
            typed = _typed(hints[item.name])
            if typed["type"] is bool and item.default is not False:
                raise TypeError(f"{owner.__name__}.{item.name}: a switch is False by default, the flag makes it True")
            found.append(Setting(item.name, item.default, **typed, **stated))
    return tuple(found)


def _stated(owner: type, name: str) -> dict[str, Any] | None:
    for base in owner.__mro__:
        item = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if item is not None and "setting" in item.metadata:
            return item.metadata["setting"]
    return None


def _typed(hint: Any) -> dict[str, Any]:
    optional = typing.get_origin(hint) in (UnionType, typing.Union) and NoneType in typing.get_args(hint)
    if optional:
        (hint,) = [each for each in typing.get_args(hint) if each is not NoneType]
    typed = {"optional": optional, "count": None, "choices": None, "type": hint}
    if typing.get_origin(hint) is typing.Literal:
        typed |= {"type": str, "choices": typing.get_args(hint)}
    elif typing.get_origin(hint) is tuple and len(set(typing.get_args(hint))) == 1:
        typed |= {"type": typing.get_args(hint)[0], "count": len(typing.get_args(hint))}
    if typed["type"] not in (float, int, str, bool):
        raise TypeError(
            f"{hint} is no type for a setting: float, int, str, bool, Literal, a tuple of one type, or None"
        )
    return typed


def construct(owner: type[T], **values: Any) -> T:
    """owner(**values). ValueError, one line, for a setting whose value is none it can have."""
    built = owner(**values)
    check_settings(built)  # not every owner of your own is a Checked
    return built


class Checked:
    """Base of owners: what is built with a value out of range raises ValueError naming the field."""

    def __post_init__(self) -> None:
        check_settings(self)


def check_settings(owner: object) -> None:
    """Raise ValueError, one line, for the first setting of `owner` whose value is none it can have."""
    kind: type = type(owner)  # mypy takes a narrower type to be unhashable
    for each in settings_of(kind):
        value = getattr(owner, each.name)
        if value is None and each.optional:
            continue
        if each.count is not None and (not isinstance(value, tuple | list) or len(value) != each.count):
            raise ValueError(f"{each.name} must be {each.count} numbers, got {value!r}")
        for one in value if each.count is not None else (value,):
            if each.choices:
                check_choice(each.name, one, each.choices)
            elif each.type in (float, int):
                check_number(each.name, one, each.within or "(-inf, inf)")


def check_number(name: str, value: float, interval: str) -> None:
    """Raise ValueError unless `value` is a number in `interval`, written as in a textbook: "(0, 1]", "[0, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and not math.isnan(value)
        and (low <= value if interval[0] == "[" else low < value)
        and (value <= high if interval[-1] == "]" else value < high)
    )
    if not inside:
        raise ValueError(f"{name} must be a number in {interval}, got {value!r}")


def check_choice(name: str, value: str, choices: typing.Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
