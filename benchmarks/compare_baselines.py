"""Which ratios of new benchmark files got worse than the kept ones?

    python benchmarks/compare_baselines.py runs/laptop.json --tolerance 0.1

Files are those of the benchmarks' --json; benchmarks/baselines.json holds ratios only, since seconds of one machine
say nothing on another. A ratio is worse when it lies further than the tolerance on the wrong side of the kept one.
Exit code 1: some are worse; 2: a file or a benchmark is not known. `--update` takes the files' ratios in.
"""

import argparse
import json
import sys
from pathlib import Path

BASELINES = Path(__file__).with_name("baselines.json")


def load(path: Path) -> dict:
    """ValueError, in one line, for what is no file of a benchmark."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(record, dict) or not {"benchmark", "ratios"} <= record.keys():
        raise ValueError(f"{path} is no file of a benchmark: it has no `benchmark` and `ratios`")
    return record


def change(kept: dict, new: dict) -> float:
    """By how much the new ratio is worse, as a share of the kept one; negative where it is better."""
    grown = new["value"] / kept["value"] - 1.0
    return -grown if kept["better"] == "higher" else grown


def compare(kept: dict[str, dict], new: dict[str, dict], tolerance: float) -> tuple[list[list[str]], list[str]]:
    """(rows of a table, names of the ratios that got worse). A ratio that was not measured this time is no change."""
    rows, worse = [], []
    for name, entry in new.items():
        if name not in kept:
            rows.append([name, "", f"{entry['value']:.3g}", "new"])
            continue
        by = change(kept[name], entry)
        verdict = "worse" if by > tolerance else "better" if by < -tolerance else "same"
        rows.append([name, f"{kept[name]['value']:.3g}", f"{entry['value']:.3g}", f"{verdict}, {-by:+.0%}"])
        if verdict == "worse":
            worse.append(name)
    return rows, worse


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tolerance", type=float, default=0.1, help="share of a ratio (default 0.1)")
    parser.add_argument("--baselines", type=Path, default=BASELINES, help=f"default {BASELINES.name}")
    parser.add_argument("--update", action="store_true", help="take the files' ratios in, and compare nothing")
    args = parser.parse_args(argv)
    try:
        kept = json.loads(args.baselines.read_text(encoding="utf-8"))
        records = [load(path) for path in args.files]
        if args.update:
            for record in records:
                kept.setdefault(record["benchmark"], {}).update(record["ratios"])
            args.baselines.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            return 0
        unknown = [record["benchmark"] for record in records if record["benchmark"] not in kept]
        if unknown:
            raise ValueError(f"{args.baselines} has no ratios of {unknown[0]}: add them with --update")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    any_worse = False
    for record in records:
        rows, worse = compare(kept[record["benchmark"]], record["ratios"], args.tolerance)
        any_worse = any_worse or bool(worse)
        for name, before, now, verdict in rows:
            print(f"{record['benchmark']}: {name}: {before} -> {now}: {verdict}")
    return int(any_worse)


if __name__ == "__main__":
    sys.exit(main())
