"""docs/openrlhf_flags.md, from the parser and from what checks are made of: `python -m openrlhf_apo.options.flag_docs`
writes it anew, and a test fails when it is stale."""

import argparse
import re
from collections import defaultdict
from pathlib import Path

from openrlhf_apo.options import owners
from openrlhf_apo.options.conditions import CONDITIONS
from openrlhf_apo.options.openrlhf_flags import openrlhf_flag
from openrlhf_apo.options.resolve import make_parser
from openrlhf_apo.options.runtime import needs_ray
from openrlhf_apo.options.upstream import upstream_parser
from openrlhf_apo.options.uses import Use
from openrlhf_apo.settings import Setting, settings_of

PAGE = Path(__file__).parents[2] / "docs" / "openrlhf_flags.md"
CLASSES = {"works": "works", "gpu": "GPU", "differs": "differs", "owner": "by loss", "refused": "refused"}
HEAD = """# Flags

Written by `.venv/bin/python -m openrlhf_apo.options.flag_docs`; the checks are made from the same tables. Every flag
goes on the command line or, without dashes, in a `--config` file.

## OpenRLHF's

All flags of `openrlhf.cli.train_ppo_ray` 0.11.2, with their defaults there, under group and token losses
([algorithms.md](algorithms.md)) and under `--loss openrlhf`, OpenRLHF's own step:

- **works** as in OpenRLHF; **GPU**: with one, and refused without;
- **differs**: works, and the note says in what it is not OpenRLHF's;
- **by loss**: works with the losses that take it over, and is refused with others;
- **refused** in one line, before anything starts, for the reason in the note.

A flag with the note "--runtime ray" is refused with `--runtime embedded`, and chooses ray where nothing is said of it.

"No effect ..." says beside or without which other flag this one does nothing: given there, it is refused. A given flag
that OpenRLHF would change for the sake of others is an error; a default that it changes is a line of the log.
"""
OWN_HEAD = """
## This project's

Flags that a loss or a controller owns are refused beside another.
"""


def page() -> str:
    upstream = [action for action in upstream_parser()._actions if action.dest != "help"]
    known = {option for action in upstream for option in action.option_strings}
    parser = make_parser()
    text = HEAD
    sections: dict[str, list[str]] = defaultdict(list)
    for action in sorted(upstream, key=lambda action: action.option_strings[0]):
        name = action.option_strings[0].removeprefix("--")
        sections[name.split(".")[0] if "." in name else "others"].append(_upstream_row(name, action))
    for section, rows in sections.items():
        text += _table(section, ["flag", "default", "range", "group", "token", "openrlhf", "note"], rows)
    text += OWN_HEAD
    for group in parser._action_groups:
        own = [a for a in group._group_actions if a.dest != "help" and a.option_strings[0] not in known]
        if own:
            title = "the run itself" if group.title == "options" else group.title
            text += _table(title, ["flag", "default", "range", "of", "what it does"], map(_own_row, own))
    return text


def _table(title: str, columns: list[str], rows) -> str:
    return "\n".join(["", f"### {title}", "", _row(columns), _row(["---"] * len(columns)), *rows, ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _upstream_row(name: str, action: argparse.Action) -> str:
    entry = openrlhf_flag(name)
    uses = [entry.group, entry.token, entry.openrlhf]
    choices = entry.choices or action.choices
    values = ", ".join(choices) if choices else entry.within or ""
    if entry.beside is not None:
        values += f" or {entry.beside}"
    notes = _texts(uses)
    if entry.package:
        notes.append(f"needs {entry.package}")
    if needs_ray(name) and any(use.kind != "refused" for use in uses):
        notes.append("--runtime ray")
    if any(use.kind != "refused" for use in uses):
        notes += _conditions(action)
    if any(use.kind == "owner" for use in uses):
        notes.append(f"of {_takers(name)}")
    return _row([f"`--{name}`", _default(action), values, *(CLASSES[use.kind] for use in uses), "; ".join(notes)])


def _texts(uses: list[Use]) -> list[str]:
    """What the uses say; said once where all say the same, else with the losses that it is said of."""
    group, token, openrlhf = (use.text for use in uses)
    if group == token == openrlhf:
        return [group] if group else []
    if group == token:
        said = {"": group, "openrlhf: ": openrlhf}
    else:
        said = {"group: ": group, "token: ": token, "openrlhf: ": openrlhf}
    return [f"{whose}{text}" for whose, text in said.items() if text]


def _conditions(action: argparse.Action) -> list[str]:
    return [f"no effect {condition.because}" for condition in CONDITIONS if condition.names(action.dest)]


def _takers(name: str) -> str:
    """The losses that take one of OpenRLHF's flags over, with their defaults."""
    flag, named = "actor.eps_clip_low_high" if name == "actor.eps_clip" else name, []
    for loss in owners.losses().values():
        defaults = [each.default for each in loss.settings if each.flag == flag]
        if defaults:
            named.append(f"{loss.name} ({' '.join(map(str, defaults))})")
    return ", ".join(named)


def _default(action: argparse.Action) -> str:
    if action.dest == "logger.wandb.run_name":
        return "ppo_ and the time"
    if action.option_strings[0] != f"--{action.dest}":
        return ""  # another name for a flag that has its own line
    if action.nargs == 0:
        return "off" if action.default == (not action.const) else "on"
    return _shown(action.default)


def _shown(default) -> str:
    if default is None or default == "":
        return ""
    if isinstance(default, list | tuple):
        return " ".join(map(_shown, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _own_row(action: argparse.Action) -> str:
    name = action.option_strings[0].removeprefix("--")
    stated = [
        (owner, each) for owner in owners.owners() for each in settings_of(owner.cls) if owner.flag(each) == name
    ]
    values = ", ".join(action.choices) if action.choices else (stated[0][1].within or "") if stated else ""
    help_text = stated[0][1].help if stated else action.help
    if action.default is not None:  # it has a column
        help_text = re.sub(r" \(default [^)]*\)", "", help_text)
    notes = [help_text.replace("%%", "%")]
    notes += _conditions(action)
    whose = ", ".join(dict.fromkeys(_whose(owner, each) for owner, each in stated))
    return _row([f"`--{name}`", _default(action), values, whose, "; ".join(notes)])


def _whose(owner: owners.Owner, setting: Setting) -> str:
    """The loss, the controller or the switch that the setting belongs to."""
    if owner.prefix == "apo":
        return "group losses" if setting.uses is None else f"losses that use {setting.uses}"
    return {"adrpo": "--adrpo.enable", "guidance": "--guidance.enable"}.get(owner.prefix, owner.prefix)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
