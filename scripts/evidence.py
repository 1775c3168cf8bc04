"""The tables of docs/evidence.md, made of docs/evidence/*.csv, and its picture docs/evidence.png.

    .venv/bin/python scripts/evidence.py

A CSV is the results.csv that `openrlhf_apo.cli.compare configs/evidence/CELL.yaml` writes, as CELL.csv. A line
`<!-- rates PREFIX -->`, `<!-- cell NAME BASELINE -->` or `<!-- differences NAME:ARM:ARM ... -->` of the page is
followed by its table, up to `<!-- end -->`.
"""

import csv
import re
from pathlib import Path
from statistics import fmean

import numpy as np

from openrlhf_apo.analysis.compare_results import difference, table_row
from openrlhf_apo.analysis.compare_statistics import mean_and_half_width, paired_differences
from openrlhf_apo.analysis.figures import COLORS, MUTED, STYLE, new_page, write_title

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
FOLDER = PAGE.with_suffix("")
DRAWN = {f"pairs_{n}": f"Pairs, {n} update{'s' * (n > 1)} per rollout" for n in (1, 4, 16)}


def read(cell: str) -> list[dict]:
    """The finished runs of a cell, numbers as numbers."""
    with open(FOLDER / f"{cell}.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "finished"]
    return [{key: _number(value) for key, value in row.items() if value != ""} for row in rows]


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def rates_table(prefix: str) -> list[str]:
    """Area under the reward curve (best of 8 held-out answers) by learning rate, of every cell PREFIX_UPDATES; of an
    arm's areas the largest in bold."""
    found: dict[tuple[str, str], dict[str, dict]] = {}  # (updates, arm) -> rate -> row
    for path in sorted(FOLDER.glob(f"{prefix}_*.csv"), key=lambda path: int(path.stem.rpartition("_")[2])):
        for row in read(path.stem):
            arm, _, rate = row["arm"].rpartition("_")
            found.setdefault((path.stem.rpartition("_")[2], arm), {})[rate] = row
    rates = sorted({rate for by_rate in found.values() for rate in by_rate}, key=float)
    lines = [table_row(["updates", "arm", *rates]), table_row(["---:", "---", *["---:"] * len(rates)])]
    for (updates, arm), by_rate in found.items():
        largest = max(row["auc"] for row in by_rate.values())
        cells = [""] * len(rates)
        for rate, row in by_rate.items():
            area = f"**{row['auc']:.3f}**" if row["auc"] == largest else f"{row['auc']:.3f}"
            best = row[columns_of([row])[1]]
            cells[rates.index(rate)] = f"{area} ({best:.2f})"
        lines.append(table_row([updates, arm, *cells]))
    return lines


def cell_table(cell: str, baseline: str) -> list[str]:
    """A row per arm: means over seeds, and the differences from `baseline`, seed by seed, with their intervals."""
    rows = read(cell)
    held_out, best = columns_of(rows)
    shifted = "_shifted/".join(held_out.rsplit("/", 1))
    different = f"{held_out.rpartition('/')[0]}/distinct_right"
    columns = {"final_reward": "reward", held_out: "held-out", best: "best of 8"}
    columns |= {different: "different", shifted: "shifted", "final_entropy": "entropy"}
    columns |= {"final_alpha": "α"}  # of losses that have one
    columns = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    differing = [key for key in ("final_reward", held_out, best) if key in columns]
    head = ["arm", "seeds", *columns.values(), *(f"{columns[key]} − {baseline}" for key in differing)]
    lines = [table_row(head), table_row(["---"] + ["---:"] * (len(head) - 1))]
    theirs = [row for row in rows if row["arm"] == baseline]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        ours = [row for row in rows if row["arm"] == arm]
        cells = [f"{fmean(row[key] for row in ours):.3f}" if key in ours[0] else "" for key in columns]
        for key in differing:
            cells.append("" if arm == baseline else difference(ours, theirs, key))
        lines.append(table_row([arm, str(len(ours)), *cells]))
    return lines


def differences_table(*pairs: str) -> list[str]:
    """A row for each CELL:ARM:OTHER, arm less other, seed by seed."""
    names = ["reward", "held-out", "best of 8", "different", "entropy"]
    lines = [table_row(["cell", "arm less arm", *names]), table_row(["---", "---"] + ["---:"] * len(names))]
    for pair in pairs:
        cell, arm, other = pair.split(":")
        rows = read(cell)
        held_out, best = columns_of(rows)
        different = f"{held_out.rpartition('/')[0]}/distinct_right"
        ours, theirs = ([row for row in rows if row["arm"] == name] for name in (arm, other))
        columns = ("final_reward", held_out, best, different, "final_entropy")
        cells = [difference(ours, theirs, column) for column in columns]
        lines.append(table_row([cell, f"{arm} − {other}", *cells]))
    return lines


def columns_of(rows: list[dict]) -> tuple[str, str]:
    """Those of the mean and of the best of 8 of the held-out answers, less those of the shifted prompts."""
    sets = {key.split("/")[1] for key in rows[0] if key.count("/") == 2}  # pairs, pairs_shifted
    prefix = f"eval/{min(sets, key=len)}/" if sets else "eval/"
    graded = f"{prefix}score_mean" in rows[0]
    return prefix + ("score_mean" if graded else "pass1"), prefix + ("score_best8" if graded else "pass8")


TABLES = {"rates": rates_table, "cell": cell_table, "differences": differences_table}


def rebuilt(page: str) -> str:
    """The page with its tables made anew."""

    def table(match: re.Match) -> str:
        kind, *words = match[1].split()
        lines = TABLES[kind](*words)
        return "\n".join([f"<!-- {match[1]} -->", *lines, "<!-- end -->"])

    return re.sub(rf"<!-- ((?:{'|'.join(TABLES)}) [^>]*?) -->\n(?:\|.*\n)*<!-- end -->", table, page)


def draw(cells: dict[str, str], baseline: str) -> None:
    """Against fixed α, the differences from `baseline`, seed by seed, in final reward and in the best held-out answer:
    dots, and their means with 95 % intervals. A column for each of {cell: title}."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, grid = new_page(6.2, 0.75, 0.45, 2, len(cells), width=4.6 * len(cells), left=0.07, hspace=0.45)
        readings = (
            f"final sampled reward, less that of {baseline}",
            f"best of 8 held-out answers, less that of {baseline}",
        )
        for column, (cell, title) in enumerate(cells.items()):
            rows = read(cell)
            for line, key in enumerate(("final_reward", columns_of(rows)[1])):
                beside = figure.axes[line] if column else None
                axes = figure.add_subplot(grid[line, column], sharey=beside)
                draw_against_alpha(axes, rows, key, baseline)
                write_title(axes, "" if line else title, readings[line])
        figure.savefig(PAGE.with_suffix(".png"))


def draw_against_alpha(axes, rows: list[dict], key: str, baseline: str) -> None:
    theirs = [row for row in rows if row["arm"] == baseline]
    fixed: dict[float, list[float]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        if match := re.fullmatch(r"apo_(\d\d)", arm):
            ours = [row for row in rows if row["arm"] == arm]
            fixed[int(match[1]) / 100] = paired_differences(ours, theirs, key)
    axes.axhline(0, color=COLORS[1], lw=1.4)
    means, halves = zip(*map(mean_and_half_width, fixed.values()), strict=True)
    for alpha, differences in fixed.items():
        axes.scatter([alpha] * len(differences), differences, s=9, color=COLORS[0], alpha=0.35, lw=0)
    axes.errorbar(list(fixed), means, np.array(halves, float), color=COLORS[0], marker="o", ms=5, capsize=2)
    axes.set_xticks(list(fixed))
    axes.set_xlabel("α", color=MUTED)


def main() -> None:
    PAGE.write_text(rebuilt(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw(DRAWN, "grpo")


if __name__ == "__main__":
    main()
