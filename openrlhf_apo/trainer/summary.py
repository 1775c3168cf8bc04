"""How a run ended, from its metrics.jsonl: a few lines for the console, and for the model's card."""

import os
import sys
from pathlib import Path
from statistics import fmean

from openrlhf_apo.trainer.clock import duration
from openrlhf_apo.trainer.metrics import first_and_last_fifth, held_out


def closing_lines(rows: list[dict], done: int, total: int, directory: Path, model: str) -> list[str]:
    """model: where it is, as a sentence."""
    seconds = sum(row.get("time/step", 0.0) for row in rows)
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    speed = f", {fmean(speeds):,.0f} tokens/s" if speeds else ""
    ended = f"{done} of {total} rollouts done in {duration(seconds)}{speed}"
    report = f"{_near(Path(sys.executable))} -m openrlhf_apo.cli.report {_near(directory)}"
    return [ended, *gains(rows), model, f"draw it: {report}"]


def gains(rows: list[dict]) -> list[str]:
    """What was gained in sampled and in held-out reward, as far as it was measured."""
    found = []
    if rewards := [row["reward_mean"] for row in rows if "reward_mean" in row]:
        first, last, fifth = first_and_last_fifth(rewards)
        ends = f"means of {fifth} rollouts" if fifth > 1 else "one rollout"
        found.append(f"sampled reward from {first:.3f} to {last:.3f} ({ends} at each end of {len(rewards)})")
    key, evaluated = held_out(rows)
    if evaluated:
        (start, first), (end, last) = evaluated[0], evaluated[-1]
        if len(evaluated) == 1:
            found.append(f"held-out {key} {first:.3f} (after rollout {start})")
        else:
            found.append(f"held-out {key} from {first:.3f} to {last:.3f} (after rollouts {start} and {end})")
    return found


def _near(path: Path) -> str:
    """As one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
