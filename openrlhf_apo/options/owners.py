"""Who owns which flag: from the settings that losses, controllers and the rest state (settings.py) to flags, to the
refusal of a flag whose owner is not in use, and to the owner built with its flags' values."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from openrlhf_apo.alpha import CONTROLLERS
from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import (
    GROUP_LOSSES,
    TOKEN_LOSSES,
    Adrpo,
    AlphaDivergenceLoss,
    GroupTargetBuilder,
    Guidance,
    Loss,
)
from openrlhf_apo.settings import Setting, construct, settings_of
from openrlhf_apo.trainer.anchor import AnchorSettings
from openrlhf_apo.trainer.group_objective import GroupSettings


@dataclass(frozen=True)
class Owner:
    """cls: holds the settings. prefix: of their flags. group: heading in --help. unused(args): None where the owner
    is in use, else why it is not, with the way to use it, to go on after "--flag has no effect"."""

    cls: type
    prefix: str
    group: str
    unused: Callable[[argparse.Namespace], str | None]

    def flag(self, setting: Setting) -> str:
        return setting.flag or f"{self.prefix}.{setting.name}"

    def build(self, value_of: Callable[[str], object], **fields):
        """The owner with the values of its flags. ValueError names a field that has none it can have."""
        for each in settings_of(self.cls):
            value = value_of(self.flag(each))
            if each.part is not None:
                value = value[each.part]
            fields[each.name] = tuple(value) if each.count is not None and value is not None else value
        return construct(self.cls, **fields)


def losses() -> dict[str, Loss]:
    return GROUP_LOSSES | TOKEN_LOSSES


def uses(loss: str, what: str) -> bool:
    """Whether the loss declares to use it (`uses=`); OpenRLHF's own step has no such word."""
    return loss in losses() and what in losses()[loss].uses


def owners() -> list[Owner]:
    """All of them, those of your own losses and controllers included."""
    found = [
        Owner(loss.implementation, loss.name, "losses", _unless("loss", loss.name))
        for loss in losses().values()
        if loss.settings
    ]
    found += [Owner(cls, name, "alpha", _unless_controls(name)) for name, cls in CONTROLLERS.items()]
    found += [Owner(cls, "apo", "group losses", _unless_group) for cls in (AlphaDivergenceLoss, GroupTargetBuilder)]
    found += [Owner(cls, "apo", "group losses", _unless_group) for cls in (AnchorSettings, GroupSettings)]
    return [*found, ADRPO, GUIDANCE]


def owner_of(cls: type) -> Owner:
    return next(owner for owner in owners() if owner.cls is cls)


def _unless(flag: str, value: object) -> Callable[[argparse.Namespace], str | None]:
    name = f"--{flag}" if value is True else f"--{flag} {value}"

    def unused(args: argparse.Namespace) -> str | None:
        given = getattr(args, flag)
        return None if given == value else f"with --{flag} {given}: drop it, or use {name}"

    return unused


def _unless_controls(mode: str) -> Callable[[argparse.Namespace], str | None]:
    def unused(args: argparse.Namespace) -> str | None:
        if not uses(args.loss, "alpha"):
            return f"with --loss {args.loss}, which has no alpha: drop it"
        return _unless("alpha_mode", mode)(args)

    return unused


def _unless_group(args: argparse.Namespace) -> str | None:
    return None if args.loss in GROUP_LOSSES else f"with --loss {args.loss}: drop it"


ADRPO = Owner(Adrpo, "adrpo", "regularizers", _unless("adrpo.enable", True))
GUIDANCE = Owner(Guidance, "guidance", "sampling", _unless("guidance.enable", True))


def add_owned_flags(parser: argparse.ArgumentParser) -> None:
    """A flag of each setting; one that several owners share is one flag."""
    known = {option for action in parser._actions for option in action.option_strings}
    stated: dict[str, tuple[Owner, Setting, list[str]]] = {}
    for owner in owners():
        for each in settings_of(owner.cls):
            _, _, users = stated.setdefault(owner.flag(each), (owner, each, []))
            users.append(owner.prefix)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag, (owner, each, users) in stated.items():
        if f"--{flag}" in known:
            continue  # OpenRLHF's; its default is the loss's (resolve.py)
        group = groups.setdefault(owner.group, parser.add_argument_group(owner.group))
        text = f"{', '.join(users)}: {each.help}" if owner.group in ("losses", "alpha") else each.help
        if each.type is bool:
            group.add_argument(f"--{flag}", action="store_true", help=text)
            continue
        group.add_argument(
            f"--{flag}",
            type=each.type,
            default=each.default,
            nargs=each.count,
            choices=each.choices,
            help=f"{text} (default {_shown(each.default)})".replace("%", "%%"),
        )


def _shown(default) -> str:
    return " ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)


def refusal(flag: str, args: argparse.Namespace) -> str | None:
    """Why a flag that owners state has no effect; None where it has, or where no owner states it."""
    reasons = []
    for owner in owners():
        for each in settings_of(owner.cls):
            if owner.flag(each) == flag:
                reason = owner.unused(args) or _unused(each, owner, args)
                if reason is None:
                    return None
                reasons.append(reason)
    if not reasons:
        return None
    # Where several owners share the flag and none is in use, what they have in common is the choice itself.
    chosen = "loss" if all(reason.startswith("with --loss") for reason in reasons) else "alpha_mode"
    return reasons[0] if len(set(reasons)) == 1 else f"with --{chosen} {getattr(args, chosen)}: drop it"


def _unused(each: Setting, owner: Owner, args: argparse.Namespace) -> str | None:
    if each.uses is not None and not uses(args.loss, each.uses):
        return f"with --loss {args.loss}: drop it"
    if each.needs is not None:
        field, values = each.needs
        needed = next(other for other in settings_of(owner.cls) if other.name == field)
        given = getattr(args, owner.flag(needed))
        if given not in values:
            return f"with --{owner.flag(needed)} {given}: drop it"
    return None


def value_of(args, flag: str):
    """The value of a flag in nested settings."""
    for name in flag.split("."):
        args = getattr(args, name)
    return args


def build(owner: Owner, args, **fields):
    """The owner with the values of nested settings; OptionError in one line for a value that it refuses."""
    try:
        return owner.build(lambda flag: value_of(args, flag), **fields)
    except ValueError as error:
        raise OptionError(f"--loss {args.loss}: {error}") from None
