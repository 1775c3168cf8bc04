"""Prompts from a data set, through OpenRLHF's own reader and templates."""

import logging
from collections.abc import Callable
from types import SimpleNamespace

from datasets.exceptions import DatasetsError
from openrlhf.datasets import PromptDataset
from openrlhf.datasets.utils import blending_datasets

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
    label_optional: as if None where there is no such column. prompt_limit:
    tokens that a prompt may have. check_label(label): what is wrong with it, or None. Raises DataError, naming the
    fix, for data that is missing, empty, without an asked column, or with a prompt that is too long.
    """
    data = args.data
    # What OpenRLHF's reader takes for a strategy. It would print each table and a progress bar on rank 0.
    reader = SimpleNamespace(
        args=SimpleNamespace(data=SimpleNamespace(**vars(data)), use_ms=args.use_ms),
        is_rank_0=lambda: False,
        print=logger.debug,
    )
    try:
        table = blending_datasets(names, probabilities, reader, seed, max_count=data.max_samples, dataset_split=split)
    except OSError as error:
        raise DataError(f"cannot read the data set {names!r}: {str(error).splitlines()[0]}") from None
    except StopIteration:  # what `datasets` lets out for an empty JSON file
        raise DataError(f"the data set {names!r} is empty") from None
    except AssertionError as error:  # a wrong number of --data.prompt_probs
        raise DataError(f"--data.prompt_probs {probabilities} does not fit {names!r}: {error}") from None
    except AttributeError:  # what blending_datasets makes of a split that is not there
        raise DataError(f"the data set {names!r} has no split {split!r}") from None
    except (ValueError, DatasetsError) as error:
        raise DataError(f"the data set {names!r} cannot be read: {str(error).splitlines()[0]}") from None
    if len(table) == 0:
        raise DataError(f"the data set {names!r} is empty")
    if label_optional and label_key not in table.column_names:
        label_key = None
    reader.args.data.label_key = label_key
    columns = (
        ("--data.input_key", data.input_key),
        ("--data.label_key", label_key),
        ("--guidance.solution_key", solution_key),
    )
    for flag, column in columns:
        if column is not None and column not in table.column_names:
            raise DataError(f"{names!r} has no column {column!r} ({flag}); it has {', '.join(table.column_names)}")
    table = table.select(range(min(data.max_samples, len(table))))
    solutions = [text or "" for text in table[solution_key]] if solution_key else [""] * len(table)
    loaded = PromptDataset(table, tokenizer, reader, input_template=data.input_template)
    rows = []
    for number, (text, label, datasource, solution) in enumerate(
        zip(loaded.prompts, loaded.labels, loaded.datasources, solutions, strict=True), start=1
    ):
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > prompt_limit:
            raise DataError(
                f"a prompt of {names!r} has {length} tokens, but --data.max_len {data.max_len} leaves {prompt_limit} "
                f"beside the new tokens; raise --data.max_len or filter the data (prompt {text[:60]!r})"
            )
        if wrong := check_label(label):
            raise DataError(f"row {number} of {names!r}: {wrong}")
        rows.append(PromptRow(text, label, datasource, solution))
    return rows
