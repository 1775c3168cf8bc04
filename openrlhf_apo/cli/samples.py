"""Print what the policy answered, for a person to read.

    python -m openrlhf_apo.cli.samples RUN_DIR [--step N]

Every run keeps one group of every tenth rollout in RUN_DIR/samples.jsonl. Of a run with --apo.save_rollouts, --step N
prints all groups of any rollout; its directory can be given as RUN_DIR, too.
"""

import shutil
import sys
import textwrap
from pathlib import Path

from openrlhf_apo.cli.console import Parser, exit_code
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.rollout_files import saved_rollouts
from openrlhf_apo.trainer.sample_file import NAME as SAMPLES
from openrlhf_apo.trainer.sample_file import group_row
from openrlhf_apo.trainer.samples import by_group


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m openrlhf_apo.cli.samples", description="Print what the policy answered, group by group."
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="output directory of a run, or its saved rollouts")
    parser.add_argument("--step", metavar="N", type=int, help="the rollout, from 1 (default: all that were kept)")
    args = parser.parse_args(argv)
    try:
        rows = _rows(args.run, args.step)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(map(_shown, rows)))
    return 0


def _rows(run: Path, step: int | None) -> list[dict]:
    saved = saved_rollouts(run)
    if saved is not None and step in saved.rollouts():
        return [group_row(step, group) for group in by_group(saved.read(step))]
    if not (run / SAMPLES).is_file():
        if saved is None:
            raise ValueError(f"{run} has neither {SAMPLES} nor saved rollouts: give the output directory of a run")
        if step is None:  # the first group of each
            return [group_row(n, by_group(saved.read(n))[0]) for n in saved.rollouts()]
        raise ValueError(f"no rollout {step} in {saved.directory}, which has {', '.join(map(str, saved.rollouts()))}")
    rows = read_metrics(run / SAMPLES)
    kept = [row for row in rows if step in (None, row["step"])]
    if not kept:
        there = ", ".join(str(row["step"]) for row in rows)
        raise ValueError(f"{run / SAMPLES} has no group of rollout {step}, but of {there or 'none'}")
    return kept


def _shown(row: dict) -> str:
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [f"rollout {row['step']} ".ljust(width, "="), _wrapped(row["prompt"], width)]
    if row["label"]:
        lines.append(_wrapped(f"label: {row['label']}", width))
    advantages = row.get("advantages") or [None] * len(row["rewards"])
    answers = zip(row["responses"], row["rewards"], row["truncated"], advantages, strict=True)
    for number, (response, reward, truncated, advantage) in enumerate(answers, start=1):
        head = f"--- answer {number}: reward {reward:g}"
        head += "" if advantage is None else f", advantage {advantage:+.3f}"
        head += ", cut off by the length limit" if truncated else ""
        lines += [f"{head} ".ljust(width, "-"), _wrapped(response, width)]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width`, without what a terminal would obey."""
    plain = "".join(c if c.isprintable() or c == "\n" else " " if c == "\t" else repr(c)[1:-1] for c in text)
    return "\n".join(
        textwrap.fill(line, width, replace_whitespace=False, drop_whitespace=False) for line in plain.split("\n")
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
