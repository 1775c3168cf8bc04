r"""A small model warmed up on word problems of your own, to try RL on real text without a GPU.

    python -m openrlhf_apo.data.warm_model --dataset svamp.jsonl --out runs/svamp

The file has one problem per line: question, answer, and solution, an equation such as "( 76.0 - 25.0 )". Part of it
is held out; on the rest a Qwen3 of 2.2 M parameters learns to answer `(76-25)=\boxed{51}`. Writes train.jsonl,
eval.jsonl and model/, with a byte-level tokenizer that can read any text.
"""

import argparse
import json
import logging
import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from openrlhf_apo.data.files import digest, is_finished, mark_finished, write_jsonl
from openrlhf_apo.data.math_prompts import load_math_rows, split_rows, to_prompt_rows

logger = logging.getLogger(__name__)


class WarmModel(NamedTuple):
    """Where a warmed-up model and the data that goes with it are. shifted: only where there are such rows."""

    model: Path
    train: Path
    eval: Path
    shifted: Path


def build_warm_model(
    out_dir, warm_rows, train_rows, eval_rows, shifted_rows=(), *, vocab_size, hidden, layers, steps, target, seed
) -> WarmModel:
    """Write train.jsonl, eval.jsonl, shifted.jsonl and model/ (a Hugging Face folder), unless they are there already.

    Rows have `prompt`, `completion`, `label`, `datasource`; the files get those with different prompts. The rest is
    passed to the tokenizer, the model and `warm_up`. The folder is made anew when any of this, or a library, changes,
    or when a file in it was cut short.
    """
    out = Path(out_dir)
    paths = WarmModel(out / "model", out / "train.jsonl", out / "eval.jsonl", out / "shifted.jsonl")
    settings = {
        "recipe": 3,  # to be raised when warmup.py comes to make another model of the same settings
        "rows": digest(json.dumps([warm_rows, train_rows, eval_rows, shifted_rows]).encode()),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "vocab_size": vocab_size,
        "hidden": hidden,
        "layers": layers,
        "steps": steps,
        "target": target,
        "seed": seed,
    }
    if is_finished(out, settings):
        logger.info("%s is up to date", out)
        return paths

    from openrlhf_apo.data.warmup import build_model, build_tokenizer, warm_up

    (out / "done.json").unlink(missing_ok=True)
    tokenizer = build_tokenizer((row["prompt"] + row["completion"] for row in warm_rows), vocab_size)
    model = build_model(tokenizer, hidden, layers, seed)
    logger.info("warming up %.2f M parameters on %d rows", model.num_parameters() / 1e6, len(warm_rows))
    warm_up(model, tokenizer, warm_rows, steps, target, seed=seed)
    model.save_pretrained(paths.model)
    tokenizer.save_pretrained(paths.model)
    write_jsonl(paths.train, _prompt_rows(train_rows))
    write_jsonl(paths.eval, _prompt_rows(eval_rows))
    if shifted_rows:
        write_jsonl(paths.shifted, _prompt_rows(shifted_rows))
    mark_finished(out, settings)
    logger.info("wrote %s", out)
    return paths


def _prompt_rows(rows):
    """The rows with different prompts, less their completion."""
    unique = {row["prompt"]: {key: row[key] for key in ("prompt", "label", "datasource")} for row in rows}
    return list(unique.values())


def equation_rows(rows, datasource) -> list[dict]:
    r"""Prompt rows with a `completion`: the row's equation, then its boxed answer, `(76-25)=\boxed{51}`.

    ValueError when a row's `solution` is not an equation.
    """
    completions = {}
    for row in rows:
        equation = re.sub(r"\s+|\.0(?!\d)", "", row.get("solution", ""))
        if not re.fullmatch(r"[\d.+\-*/()]+", equation):
            raise ValueError(f"{datasource}: solution is {row.get('solution')!r}; warm-up needs an equation")
        completions[row["question"].strip()] = f"{equation}=\\boxed{{{row['answer']}}}"
    prompts = to_prompt_rows(rows, datasource, instruction="")
    return [row | {"completion": completions[row["prompt"]]} for row in prompts]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Warm up a small model on word problems with equations.")
    parser.add_argument("--dataset", type=Path, required=True, help="a .jsonl file: question, answer, solution")
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--eval_size", type=int, default=200, help="problems held out")
    parser.add_argument("--steps", type=int, default=1500, help="most warm-up steps to take")
    parser.add_argument("--target", type=float, default=0.4, help="stop when this share of samples would be right")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        rows = equation_rows(load_math_rows(args.dataset), args.dataset.stem)
        warm_rows, eval_rows = split_rows(rows, args.eval_size, args.seed)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    build_warm_model(
        args.out,
        warm_rows,
        warm_rows,
        eval_rows,
        vocab_size=1024,
        hidden=192,
        layers=4,
        steps=args.steps,
        target=args.target,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
