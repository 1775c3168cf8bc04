"""The words in which openrlhf_flags.py says what a flag does: one use under each kind of loss, which are group losses,
token losses, and OpenRLHF's own step (`--loss openrlhf`)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Use:
    """What a flag does under one kind of loss.

    works; gpu: with one, and refused without; differs: works, but `text` says in what it is not upstream's; owner: the
    losses that take it over decide (owners.py); refused: `text` says why, and the error goes on after the flag's name
    with `refusal`.
    """

    kind: Literal["works", "gpu", "differs", "owner", "refused"]
    text: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Flag:
    """within: the interval of the flag's values, as in a textbook; beside: one more value that it may have. package:
    what its use needs to be installed, as pip has it."""

    group: Use
    token: Use
    openrlhf: Use
    within: str | None = None
    beside: int | None = None
    choices: tuple[str, ...] | None = None
    package: str | None = None

    def use(self, kind: str) -> Use:
        return getattr(self, kind)


WORKS, GPU = Use("works"), Use("gpu")


def works(note: str = "", **limits) -> Flag:
    return _everywhere(Use("works", note), **limits)


def gpu(note: str = "", **limits) -> Flag:
    return _everywhere(Use("gpu", note), **limits)


def differs(how: str, **limits) -> Flag:
    return _everywhere(Use("differs", how), **limits)


def nowhere(why: str) -> Flag:
    return _everywhere(Use("refused", why, "has no effect here: drop it"))


def only_openrlhf(why: str, use: Use = WORKS, **limits) -> Flag:
    """why: what has its place under other losses."""
    no = Use("refused", why, "has no effect with --loss {loss}: drop it, or use --loss openrlhf")
    return Flag(no, no, use, **limits)


def ours(use: Use, openrlhf: Use = WORKS, **limits) -> Flag:
    """use: under group and token losses."""
    return Flag(use, use, openrlhf, **limits)


def _everywhere(use: Use, **limits) -> Flag:
    return Flag(use, use, use, **limits)
