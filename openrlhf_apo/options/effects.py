"""Each given flag by itself: whether it has an effect with this loss, these flags and this device, and a value that it
can have. What is asked of a flag is stated in openrlhf_flags.py, conditions.py and owners.py."""

import argparse
from importlib.metadata import version
from importlib.util import find_spec

from packaging.requirements import Requirement

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import owners
from openrlhf_apo.options.conditions import CONDITIONS, Values
from openrlhf_apo.options.flags import PACKAGES
from openrlhf_apo.options.openrlhf_flags import Flag, kind_of, openrlhf_flag
from openrlhf_apo.settings import check_number


def refuse_flags_without_effect(args: argparse.Namespace, given: set[str]) -> None:
    """`given`: the flags that the user or the file sets."""
    values = Values(args, given)
    for flag in sorted(given):
        if reason := _refusal(flag, values):
            name = "--reward" if flag == "reward.name" else f"--{flag}"
            raise OptionError(f"{name} {reason}")


def _refusal(flag: str, values: Values) -> str | None:
    """Why the flag cannot be given here and what to do, to go on after its name; None where it can."""
    loss, entry = values["loss"], openrlhf_flag(flag)
    use = entry.use(kind_of(loss)) if entry else None
    if use and use.kind == "refused":
        return f"{use.refusal.format(loss=loss)} ({use.text})"
    if use and use.kind == "gpu" and not has_cuda() and _asks(values[flag]):
        return "needs a GPU: drop it"
    for condition in CONDITIONS:
        if condition.names(flag) and condition.when(values):
            return f"has no effect {condition.because}: {condition.fix}"
    if flag == "alpha_mode" and not owners.uses(loss, "alpha"):
        return f"has no effect with --loss {loss}: drop it"
    if use is None or use.kind == "owner":
        owned = "actor.eps_clip_low_high" if flag == "actor.eps_clip" else flag
        if reason := owners.refusal(owned, values.args):
            return f"has no effect {reason}"
    return None


def _asks(value) -> bool:
    """Whether a value asks for something: a switch that is off does not, nor does a size of 1."""
    return not (value is None or value is False or (type(value) is int and value == 1))


def check_values(args: argparse.Namespace, given: set[str]) -> None:
    """OpenRLHF's flags have values in their range, and the packages that they need are there."""
    for flag in sorted(given):
        entry, value = openrlhf_flag(flag), getattr(args, flag)
        if flag in PACKAGES and value:
            _need_package(flag, PACKAGES[flag])
        if entry is None or value is None:
            continue
        if entry.choices and value not in entry.choices:
            raise OptionError(f"--{flag} must be one of {', '.join(entry.choices)}, got {value!r}")
        if entry.within and value != entry.beside:
            _check_range(flag, value, entry)
        if entry.package and _asks(value):
            _need_package(flag, entry.package)


def _check_range(flag: str, value, entry: Flag) -> None:
    try:
        for number in value if isinstance(value, list) else [value]:
            check_number(f"--{flag}", number, entry.within)
    except ValueError as error:
        also = "" if entry.beside is None else f" (or {entry.beside}, for never)"
        raise OptionError(f"{error}{also}") from None


def _need_package(flag: str, package: str) -> None:
    """Raise OptionError unless the package, as pip has it, is installed here."""
    wanted = Requirement(package)
    if find_spec(wanted.name) is None:
        raise OptionError(f"--{flag} needs the package {wanted.name}: pip install '{package}'")
    if wanted.specifier and version(wanted.name) not in wanted.specifier:
        raise OptionError(f"--{flag} needs {package}, here is {version(wanted.name)}: pip install '{package}'")
