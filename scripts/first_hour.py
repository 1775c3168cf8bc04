"""Walks a newcomer's first hour in a fresh clone, and writes what was seen into docs/first_hour.md.

    .venv/bin/python scripts/first_hour.py /tmp/first_hour

The argument is where the clone goes; half an hour on two cores. Programs and flags are those of
docs/quick_start.md and docs/own_loss.md, as they stand there; the mistakes those of tests/test_typing_mistakes.py.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first_hour.md"
LIMIT = 3600  # seconds, of one command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    clone = parser.parse_args().folder.resolve()
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    page = PAGE.read_text(encoding="utf-8")
    for name, made in {"walk": walk(clone), "mistakes": mistakes(clone)}.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = block.sub(lambda found, made=made: found[1] + made + found[2], page)
    PAGE.write_text(page, encoding="utf-8")


def walk(clone: Path) -> str:
    """One row per command: what it is for, its seconds, the lines that say what came of it."""
    data, reward = blocks(clone, "quick_start.md", "python", "sums.jsonl", "def reward_func")
    (loss,) = blocks(clone, "own_loss.md", "python", '@group_loss("my_adpo_softmax")')
    for name, text in {"my_data.py": data, "my_reward.py": reward, "my_loss.py": loss}.items():
        (clone / name).write_text(text, encoding="utf-8")
    (own,) = blocks(clone, "quick_start.md", "bash", "--reward my_reward.py")
    own = " ".join(own.replace("\\\n", " ").split())
    trained = own.removesuffix("--dry_run").strip()
    mine = re.sub("runs/sums", "runs/my_loss", trained)
    python = ".venv/bin/python -m openrlhf_apo.cli"
    held_out = ".cache/tiny/eval.jsonl --config configs/tiny_cpu.yaml"
    long = (
        f"{python}.train_apo_ray --config configs/tiny_cpu.yaml --ckpt.output_dir runs/long --ckpt.path runs/long/ckpt"
    )
    lines = len(f"{data}{reward}".splitlines())
    tiny = "bash examples/scripts/train_apo_tiny_cpu.sh"
    steps = [
        ("Install, make a model, train", tiny, "reward|pass@1|time"),
        ("Look at a group of answers", f"{python}.samples runs/tiny_seed1", "label|answer"),
        ("Score the model", f"{python}.evaluate runs/tiny_seed1 {held_out}", ""),
        (f"Own data and reward ({lines} lines of Python): the data", ".venv/bin/python my_data.py", ""),
        ("Look at it before training", own, "optimizer steps"),
        ("Train on it", trained, "reward|time"),
        (
            f"Own loss ({len(loss.splitlines())} lines): check it",
            f"{python}.check_loss my_loss.py",
            "better|scale|uses",
        ),
        ("Train with it", f"{mine} --loss_path my_loss.py --loss my_adpo_softmax", "reward|time"),
        ("From Python", ".venv/bin/python examples/python/train_in_python.py", ""),
        ("Ctrl-C after 30 s", f"timeout --preserve-status -s INT 30 {long}", "kept|error"),
        ("Go on from there", f"{long} --ckpt.load_enable", "resum|reward"),
        ("Look at the machine", f"{python}.doctor", ""),
    ]
    rows = ["| | seconds | exit code |", "| --- | ---: | ---: |"]
    for number, (title, line, pattern) in enumerate(steps, 1):
        code, seconds, output = run(line, clone)
        print(number, title, code, f"{seconds:.0f} s", flush=True)
        shown = [each for each in output if re.search(pattern, each)][-3:] if pattern else output[-1:]
        seen = "<br>".join(f"`{escaped(each)}`" for each in shown)
        rows.append(f"| **{number}. {title}**<br>`{line}`<br>{seen} | {seconds:.0f} | {code} |")
    return "\n".join(rows) + "\n"


def mistakes(clone: Path) -> str:
    """One row per mistake in the command that trained: what was typed, the answer, its seconds."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_typing_mistakes import FILES, MISTAKES, command

    here = clone / "mistakes"
    for name, text in FILES.items():
        (here / name).parent.mkdir(exist_ok=True, parents=True)
        (here / name).write_text(text, encoding="utf-8")
    names = {"here": "mistakes", "model": ".cache/tiny/model", "sums": "sums.jsonl"}
    rows, times = [], []
    for mistake, _ in MISTAKES:
        if mistake == "--data.apply_chat_template":
            continue  # none here: this model has a chat template
        line = shlex.join([".venv/bin/python", "-m", "openrlhf_apo.cli.train_apo_ray", *command(mistake, names)])
        code, seconds, output = run(line, clone)
        print(mistake, code, f"{seconds:.1f} s", flush=True)
        times.append(seconds)
        answer = output[-1] if code == 2 else f"exit code {code}, {len(output)} lines"
        rows.append(f"| `{mistake.format(**names)}` | {escaped(answer)} | {seconds:.1f} |")
    head = f"{len(rows)} mistakes. The answer took {median(times):.1f} s in the middle, {max(times):.1f} s at most.\n"
    return "\n".join([head, "| typed | answer | seconds |", "| --- | --- | ---: |", *rows]) + "\n"


def escaped(line: str) -> str:
    return line.strip().replace("|", r"\|")


def blocks(clone: Path, page: str, language: str, *words: str) -> list[str]:
    """The first code block of the page that has the word, for each of `words`."""
    text = (clone / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [next(block for block in found if word in block) for word in words]


def run(line: str, folder: Path) -> tuple[int, float, list[str]]:
    """Exit code, seconds, lines of output."""
    start = time.monotonic()
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    seconds = time.monotonic() - start
    return done.returncode, seconds, [each for each in (done.stderr + done.stdout).splitlines() if each.strip()]


if __name__ == "__main__":
    main()
