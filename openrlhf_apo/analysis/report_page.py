"""The report of one run as a page: one HTML file that needs no network and no script."""

import base64
from html import escape
from pathlib import Path

from openrlhf_apo.analysis.report_panels import seconds_per_step
from openrlhf_apo.analysis.verdict import verdict
from openrlhf_apo.trainer.checkpoint_folder import complete_checkpoints
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import saved_rollouts
from openrlhf_apo.trainer.run_record import read_run_record
from openrlhf_apo.trainer.samples import Sample, by_group

STEPS = 4  # of which answers are shown
ANSWERS = 4  # of a prompt
MOST_CHARACTERS = 4000  # of a prompt or an answer
WORDS = {"good": "fine", "note": "note", "look": "look"}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22272e; max-width: 1080px; margin: 2em auto; padding: 0 1em }
h2 { margin: 2em 0 .5em; font-size: 1.2em } h3 { font-size: 1em; margin: 1.5em 0 .5em }
img { width: 100% } small, .muted { color: #6e7781 }
table { border-collapse: collapse; margin: .5em 0 }
td, th { padding: .2em 1em .2em 0; text-align: left; vertical-align: top }
td { border-top: 1px solid #e6e9ed; overflow-wrap: anywhere } .number { text-align: right; white-space: nowrap }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20em; overflow: auto; font-size: 13px }
.verdict { list-style: none; padding: 0 } .verdict li { margin: .6em 0; padding-left: 4em; position: relative }
.verdict small { display: block } .verdict b { position: absolute; left: 0; width: 3.2em; text-align: center;
border-radius: 3px; font-weight: 600; font-size: 13px; color: white }
.good { background: #2f7d61 } .note { background: #6e7781 } .look { background: #c14a1f }
"""


def page(name: str, run_dir: Path, rows: list[dict], picture: bytes, summary: str) -> str:
    """HTML of the run in `run_dir`. rows: of its metrics.jsonl; picture: the PNG of its curves; summary: its table.

    Raises ValueError naming a file of the run that cannot be read.
    """
    record = read_run_record(run_dir)
    curves = base64.b64encode(picture).decode()
    parts = [
        f"<h1>{escape(name)}</h1>",
        _verdict(rows),
        f"<h2>First and last</h2><pre>{escape(summary)}</pre>",
        f'<h2>Curves</h2><img alt="the run\'s metrics over its rollouts" src="data:image/png;base64,{curves}">',
        _phases(rows),
        _answers(run_dir),
        _settings(record, run_dir),
        _environment(record),
    ]
    head = f'<meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
    body = "\n".join(filter(None, parts))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _verdict(rows: list[dict]) -> str:
    items = [
        f'<li><b class="{found.level}">{WORDS[found.level]}</b>{escape(found.text)}'
        f"<small>{escape(found.rule)}</small></li>"
        for found in verdict(rows)
    ]
    return f'<h2>Verdict</h2><ul class="verdict">{"".join(items)}</ul>' if items else ""


def _phases(rows: list[dict]) -> str:
    split = {phase: seconds for phase, seconds in seconds_per_step(rows).items() if seconds}
    if not split:
        return ""
    total = sum(split.values())
    cells = [
        f'<tr><td>{phase}</td><td class="number">{seconds:.3g}</td><td class="number">{seconds / total:.0%}</td></tr>'
        for phase, seconds in sorted(split.items(), key=lambda item: -item[1])
    ]
    head = "<tr><th>phase</th><th>seconds per rollout</th><th>share</th></tr>"
    return f"<h2>Where the time goes, slowest first</h2><table>{head}{''.join(cells)}</table>"


def _answers(run_dir: Path) -> str:
    """A prompt of the first, the last and further rollouts in between, with answers from the best to the worst."""
    if files := saved_rollouts(run_dir):
        shown = [(rollout, *_group(files.read(rollout))) for rollout in _spread(files.rollouts(), STEPS)]
    else:
        shown = _spread(_kept(run_dir / "samples.jsonl"), STEPS)
    parts = ["<h2>Sample answers</h2>"] if shown else []
    for rollout, prompt, label, answers in shown:
        ordered = sorted(answers, key=lambda answer: -answer[0])
        lines = [
            f'<tr><td class="number">{reward:.3g}</td><td>{_text(response)}</td></tr>'
            for reward, response in _spread(ordered, ANSWERS)
        ]
        parts += [
            f"<h3>Rollout {rollout}</h3>{_text(prompt)}",
            f'<p class="muted">label: {escape(str(label))}</p>' if label not in (None, "") else "",
            f'<table><tr><th class="number">reward</th><th>answer</th></tr>{"".join(lines)}</table>',
        ]
    return "\n".join(parts)


def _group(samples: list[Sample]) -> tuple[str, object, list[tuple[float, str]]]:
    """Prompt, label and (reward, response) of the first group whose rewards differ, else of the first group."""
    group = max(by_group(samples), key=lambda group: len({sample.reward for sample in group}) > 1)
    return group[0].prompt, group[0].label, [(sample.reward, sample.response) for sample in group]


def _kept(path: Path) -> list[tuple[int, str, object, list[tuple[float, str]]]]:
    """The rollout, and what `_group` says, of each line of samples.jsonl, which is a group: `step`, `prompt`, `label`,
    `responses`, `rewards`."""
    try:
        return [
            (row["step"], row["prompt"], row["label"], list(zip(row["rewards"], row["responses"], strict=True)))
            for row in (read_metrics(path) if path.exists() else ())
        ]
    except KeyError as error:
        raise ValueError(f"{path}: a line has no {error}") from None


def _spread(items: list, most: int) -> list:
    """Up to `most` of the items, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _text(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    shown = escape(text[:MOST_CHARACTERS])
    return f"<pre>{shown}</pre>" + (f"<small>{left_out:,} characters more</small>" if left_out > 0 else "")


def _settings(record: dict, run_dir: Path) -> str:
    """Those that were given, and all, folded; of a run without run.json what its checkpoint says of it."""
    if record.get("settings"):
        given = {flag: each["value"] for flag, each in record.get("given", {}).items()}
        whole = f"<details><summary>all settings</summary>{_table(record['settings'])}</details>"
        command = f"<pre>{escape(record['command'])}</pre>" if "command" in record else ""
        return f"<h2>Settings</h2>{command}{_table(given)}{whole}"
    if checkpoints := complete_checkpoints(run_dir / "ckpt" / "_actor"):
        folded = f"<details><summary>as the checkpoint has them</summary>{_table(checkpoints[0].manifest)}</details>"
        return f"<h2>Settings</h2>{folded}"
    return ""


def _environment(record: dict) -> str:
    known = {key: record[key] for key in ("started", "runtime", "device", "seed") if key in record}
    known |= {name: version for name, version in record.get("versions", {}).items() if version}
    return f"<h2>Environment</h2>{_table(known)}" if known else ""


def _table(values: dict) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in values.items())
    return f"<table>{rows}</table>"
