"""Prompts from a data set, through OpenRLHF's own reader and templates."""

import importlib.util
import itertools
import logging
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from openrlhf_apo.data.plain_rows import read_plain_rows
from openrlhf_apo.errors import DataError
from openrlhf_apo.trainer.prompts import PromptRow

logger = logging.getLogger(__name__)


def load_prompts(
    args: SimpleNamespace,
    tokenizer,
    names: str,
    *,
    probabilities: str | None = None,
    split: str,
    seed: int,
    label_key: str | None,
    label_optional: bool,
    solution_key: str | None = None,
    prompt_limit: int,
    check_label: Callable[[object], str | None] = lambda label: None,
) -> list[PromptRow]:
    """The rows of one or several data sets, comma-separated `names`.

    args: OpenRLHF's, of which it reads `data` and `use_ms`. label_key: None for data without labels;
    label_optional: as if None where there is no such column, and a row may have none. prompt_limit:
    tokens that a prompt may have. check_label(label): what is wrong with it, or None. Raises DataError, naming the
    fix, for data that is missing, empty, without an asked column, without an asked label, or with a prompt that is
    too long.
    """
    data = args.data
    # What OpenRLHF's reader takes for a strategy. It would print each table and a progress bar on rank 0.
    reader = SimpleNamespace(
        args=SimpleNamespace(data=SimpleNamespace(**vars(data)), use_ms=args.use_ms),
        is_rank_0=lambda: False,
        print=logger.debug,
    )
    table: Any = read_plain_rows(names) if split == "train" and probabilities is None else None
    if table is None:
        from openrlhf_apo.data.blended_rows import read_blended_rows  # imports datasets and pandas, 1 s

        table = read_blended_rows(names, probabilities, reader, seed, data.max_samples, split)
    if len(table) == 0:
        raise DataError(f"the data set {names!r} is empty")
    try:
        table = list(itertools.islice(table, data.max_samples))
    except UnicodeDecodeError as error:
        raise DataError(f"the data set {names!r} is not UTF-8: {error}") from None
    names_of_columns = list(table[0])
    if label_optional and label_key not in names_of_columns:
        label_key = None
    reader.args.data.label_key = label_key
    columns = (
        ("--data.input_key", data.input_key),
        ("--data.label_key", label_key),
        ("--guidance.solution_key", solution_key),
    )
    for flag, column in columns:
        if column is not None and column not in names_of_columns:
            raise DataError(f"{names!r} has no column {column!r} ({flag}); it has {', '.join(names_of_columns)}")
    for number, row in enumerate(table, start=1):
        if not row[data.input_key]:
            raise DataError(f"row {number} of {names!r} has no prompt (--data.input_key {data.input_key})")
    solutions = [row[solution_key] or "" if solution_key else "" for row in table]
    loaded = _prompt_dataset()(table, tokenizer, reader, input_template=data.input_template)
    rows = []
    for number, (text, label, datasource, solution) in enumerate(
        zip(loaded.prompts, loaded.labels, loaded.datasources, solutions, strict=True), start=1
    ):
        if not isinstance(text, str):
            raise DataError(f"row {number} of {names!r}: the prompt is {text!r} and no text")
        beginning = text[: 64 * prompt_limit]  # a prompt of megabytes takes long, and shows its length here already
        length = len(tokenizer(beginning, add_special_tokens=False)["input_ids"])
        if length <= prompt_limit and len(text) > len(beginning):
            length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > prompt_limit:
            raise DataError(
                f"a prompt of {names!r} has at least {length} tokens, but --data.max_len {data.max_len} leaves "
                f"{prompt_limit} beside the new tokens; raise --data.max_len or filter the data (prompt {text[:60]!r})"
            )
        if label_key is not None and not label_optional and (label is None or not str(label).strip()):
            raise DataError(
                f"row {number} of {names!r} has no label: fill in its {label_key!r} (--data.label_key), or leave the "
                "row out"
            )
        if wrong := check_label(label):
            raise DataError(f"row {number} of {names!r}: {wrong}")
        rows.append(PromptRow(text, label, datasource, solution))
    return rows


def _prompt_dataset() -> type:
    """OpenRLHF's PromptDataset, out of its file alone: its package imports `datasets`."""
    (folder,) = importlib.util.find_spec("openrlhf").submodule_search_locations
    path = os.path.join(folder, "datasets", "prompts_dataset.py")
    spec = importlib.util.spec_from_file_location("openrlhf.datasets.prompts_dataset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PromptDataset
