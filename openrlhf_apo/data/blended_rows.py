"""The rows of any data sets, through OpenRLHF's own reader."""

import os
from types import SimpleNamespace

from datasets import Dataset
from datasets.exceptions import DatasetsError
from openrlhf.datasets.utils import blending_datasets

from openrlhf_apo.data.files import read_jsonl
from openrlhf_apo.errors import DataError

FILES = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".py")  # that OpenRLHF's reader takes


def read_blended_rows(
    names: str, probabilities: str | None, reader: SimpleNamespace, seed: int, count: int, split: str
) -> Dataset:
    """At most `count` rows of each of the data sets, comma-separated `names`. reader: what OpenRLHF takes for a
    strategy. Raises DataError, naming the fix."""
    for name in names.split(","):  # which the reader would look for on a hub
        if os.path.isfile(name) and not name.endswith(FILES):
            raise DataError(f"the data set {name!r} is no file of rows: give one that ends with {', '.join(FILES)}")
    try:
        return blending_datasets(names, probabilities, reader, seed, max_count=count, dataset_split=split)
    except OSError as error:
        raise DataError(f"cannot read the data set {names!r}: {str(error).splitlines()[0]}") from None
    except StopIteration:  # what `datasets` lets out for an empty JSON file
        raise DataError(f"the data set {names!r} is empty") from None
    except AssertionError as error:  # a wrong number of --data.prompt_probs
        raise DataError(f"--data.prompt_probs {probabilities} does not fit {names!r}: {error}") from None
    except AttributeError:  # what blending_datasets makes of a split that is not there
        raise DataError(f"the data set {names!r} has no split {split!r}") from None
    except (ValueError, DatasetsError) as error:
        reason = (
            _bad_line(names) or str(error.__cause__ or error).splitlines()[0]
        )  # `datasets` says only that it failed
        raise DataError(f"the data set {names!r} cannot be read: {reason}") from None


def _bad_line(names: str) -> str | None:
    """Where a jsonl file is none; `datasets` counts rows from 0, and from the start of a block."""
    for name in names.split(","):
        if name.endswith(".jsonl") and os.path.isfile(name):
            try:
                read_jsonl(name)
            except ValueError as error:
                return str(error)
    return None
