r"""Math word problems as prompts with a checkable answer: MATH, GSM8K, SVAMP, or a jsonl file of your own.

    python -m openrlhf_apo.data.math_prompts --dataset EleutherAI/hendrycks_math --level 3 --out data/math_level3
    python -m openrlhf_apo.data.math_prompts --dataset my_problems.jsonl --out data/mine

writes train.jsonl and eval.jsonl with the columns prompt, label (the bare answer), datasource and solution (the
reference solution up to its answer, for `--loss g2rpo_a`; empty where there is none).
"""

import argparse
import logging
import random
import re
from pathlib import Path

from openrlhf_apo.data.files import read_jsonl, write_jsonl
from openrlhf_apo.rewards.grading import last_boxed

logger = logging.getLogger(__name__)

INSTRUCTION = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

# Which columns hold what, in the order they are looked for.
PROMPT_COLUMNS = ("problem", "question", "question_concat")
ANSWER_COLUMNS = ("answer", "Answer", "solution")


def boxed_answer(text: str) -> str | None:
    r"""The content of the last \boxed{…}, else what follows a bare `\boxed 7`, as in MATH. None without either."""
    boxed = last_boxed(text)
    bare = re.findall(r"\\boxed ([^\s$]+)", text)
    return boxed.strip() if boxed else (bare[-1].rstrip(".,") if bare else None)


def load_math_rows(source, level: int | None = None, split: str = "train") -> list[dict]:
    """The rows of a local jsonl file (whole: `split` is for the hub) or of a data set on the Hugging Face hub.

    A hub data set made of subjects, as MATH is, is read whole. `level` keeps rows whose `level` is 3 or "Level 3".
    ValueError, in one line, when there is nothing to read or nothing at that level.
    """
    is_file = Path(source).suffix == ".jsonl" or Path(source).is_file()
    rows = read_jsonl(source) if is_file else _load_hub_rows(str(source), split)
    if level is None:
        return rows
    if "level" not in rows[0]:
        raise ValueError(f"{source} has no column level, so --level cannot be used; columns are {_names(rows[0])}")
    levels = [re.sub(r"\D", "", str(row["level"])) for row in rows]
    kept = [row for row, found in zip(rows, levels, strict=True) if found == str(level)]
    if not kept:
        raise ValueError(f"no rows at level {level} in {source}; levels are {', '.join(sorted(set(levels) - {''}))}")
    return kept


def _load_hub_rows(name, split):
    from datasets import get_dataset_config_names, load_dataset

    try:
        configs = get_dataset_config_names(name)
        # GSM8K's "socratic" is "main" again with hints; MATH has one configuration per subject.
        configs = [config for config in configs if config in ("main", "default")] or configs
        rows = [row for config in configs for row in load_dataset(name, config, split=split)]
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"cannot load {name}: {reason} (a local file must end in .jsonl)") from None
    if not rows:
        raise ValueError(f"no rows in split {split} of {name}")
    return rows


def to_prompt_rows(rows, datasource, input_key=None, label_key=None, instruction=INSTRUCTION) -> list[dict]:
    r"""Rows as `prompt` (the question + `instruction`), `label` (the bare answer), `datasource` and `solution`.

    The answer is what follows `####` (GSM8K), else the content of the last \boxed (MATH), else an answer column as it
    stands. Repeated prompts and rows without an answer are left out and counted in the log.
    ValueError when a column is missing or no row is left.
    """
    input_key = _column(rows[0], input_key, PROMPT_COLUMNS, "--input_key")
    label_key = _column(rows[0], label_key, ANSWER_COLUMNS, "--label_key")
    unique = {}
    for row in rows:
        label = _bare_answer(str(row[label_key]), is_solution=label_key == "solution")
        if label:
            prompt = row[input_key].strip() + instruction
            prepared = {"prompt": prompt, "label": label, "datasource": datasource}
            unique.setdefault(prompt, prepared | {"solution": solution_before_answer(row, label)})
    if not unique:
        raise ValueError(f"no answer found in column {label_key} of {datasource}; pass --label_key")
    if len(unique) < len(rows):
        logger.warning("%s: left out %d rows without an answer or repeated", datasource, len(rows) - len(unique))
    return list(unique.values())


def solution_before_answer(row: dict, label: str) -> str:
    r"""The row's worked solution up to the sentence that gives its answer, by \boxed, `####` or the label itself;
    empty without one."""
    texts = [row[column] for column in ("solution", "answer") if isinstance(row.get(column), str)]
    text = next((text for text in texts if "####" in text or "\\boxed" in text), "")
    text = re.sub(r"<<[^<>]*>>", "", re.split(r"####|\\boxed", text)[0])  # << >>: GSM8K's calculator marks
    sentences = re.findall(r".*?(?:[.!?](?=\s)|\n)\s*", text, re.DOTALL)  # whole ones only
    given = re.compile(rf"(?<!\w){re.escape(label)}(?!\w)")
    while sentences and given.search(sentences[-1].replace(",", "")):
        sentences.pop()
    return "".join(sentences).strip()


def _bare_answer(text, is_solution):
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().replace(",", "")
    return boxed_answer(text) or ("" if is_solution else text.strip())


def _column(row, key, known, flag):
    for name in [key] if key else known:
        if name in row:
            return name
    wanted = f"column {key}" if key else f"column {' or '.join(known)}"
    raise ValueError(f"no such {wanted}; columns are {_names(row)}; pass {flag}")


def _names(row):
    return ", ".join(row)


def split_rows(rows, eval_size: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, eval) of shuffled rows. ValueError when nothing would be left to train on."""
    if not 0 <= eval_size < len(rows):
        raise ValueError(f"--eval_size is {eval_size} and there are {len(rows)} rows; it must be from 0 to fewer")
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[eval_size:], shuffled[:eval_size]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prepare math word problems as train.jsonl and eval.jsonl.")
    parser.add_argument("--dataset", required=True, help="a .jsonl file, or a data set on the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--level", type=int, help="keep this level only (MATH has 1 to 5)")
    parser.add_argument("--split", default="train", help="split of a hub data set")
    parser.add_argument("--eval_size", type=int, default=128, help="rows held out for eval.jsonl; 0: no eval.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    parser.add_argument("--input_key", help="column of the question, when it is not found by itself")
    parser.add_argument("--label_key", help="column of the answer, when it is not found by itself")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows = load_math_rows(args.dataset, args.level, args.split)
        prompts = to_prompt_rows(rows, Path(args.dataset).stem, args.input_key, args.label_key)
        train, held_out = split_rows(prompts, args.eval_size, args.seed)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    write_jsonl(args.out / "train.jsonl", train)
    (args.out / "eval.jsonl").unlink(missing_ok=True)
    if held_out:
        write_jsonl(args.out / "eval.jsonl", held_out)
    logger.info("%d rows to train on and %d to evaluate on in %s", len(train), len(held_out), args.out)


if __name__ == "__main__":
    main()
