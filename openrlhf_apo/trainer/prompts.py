"""The prompts of a run, in a seeded order that is a function of the position alone, so that a resumed run draws what
the uninterrupted one would have drawn."""

from dataclasses import dataclass

import torch
from datasets.exceptions import DatasetsError
from openrlhf.datasets import PromptDataset
from openrlhf.datasets.utils import blending_datasets

from openrlhf_apo.trainer.samples import Prompt


class DataError(ValueError):
    """The data cannot be used; the message is for the user."""


def load_prompts(
    strategy, tokenizer, names: str, probabilities: str | None, split: str, solution_key: str | None = None
) -> list[tuple]:
    """(text, label, datasource, solution) of each row, through OpenRLHF's own reader and templates.

    Raises DataError, naming the fix, for data that is missing, empty, without the asked column, or too long.
    """
    args = strategy.args
    try:
        table = blending_datasets(
            names, probabilities, strategy, args.train.seed, max_count=args.data.max_samples, dataset_split=split
        )
    except OSError as error:
        raise DataError(f"cannot read the data set {names!r}: {str(error).splitlines()[0]}") from None
    except StopIteration:  # what `datasets` lets out for an empty JSON file
        raise DataError(f"the data set {names!r} is empty") from None
    except (ValueError, DatasetsError) as error:
        raise DataError(f"the data set {names!r} cannot be read: {str(error).splitlines()[0]}") from None
    if len(table) == 0:
        raise DataError(f"the data set {names!r} is empty")
    columns = (
        ("--data.input_key", args.data.input_key),
        ("--data.label_key", args.data.label_key),
        ("--g2rpo_a.solution_key", solution_key),
    )
    for flag, column in columns:
        if column is not None and column not in table.column_names:
            raise DataError(f"{names!r} has no column {column!r} ({flag}); it has {', '.join(table.column_names)}")
    table = table.select(range(min(args.data.max_samples, len(table))))
    rows = PromptDataset(table, tokenizer, strategy, input_template=args.data.input_template)
    limit = args.data.max_len - (args.rollout.max_new_tokens or 1)
    for text in rows.prompts:
        length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if length > limit:
            raise DataError(
                f"a prompt of {names!r} has {length} tokens, but --data.max_len {args.data.max_len} leaves {limit} "
                f"beside the new tokens; raise --data.max_len or filter the data (prompt {text[:60]!r})"
            )
    solutions = [text or "" for text in table[solution_key]] if solution_key else [""] * len(table)
    return list(zip(rows.prompts, map(str, rows.labels), rows.datasources, solutions, strict=True))


@dataclass
class PromptStream:
    """Draws prompts for rollouts: every episode is a fresh permutation of the rows, seeded by (seed, episode)."""

    rows: list[tuple]
    seed: int
    episodes: int
    position: int = 0  # prompts drawn so far: the whole state
    _cached: tuple = (None, None)  # (episode, its permutation)

    def __len__(self) -> int:
        return len(self.rows) * self.episodes

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts; a draw may cross an episode."""
        prompts = []
        for position in range(self.position, self.position + count):
            episode, offset = divmod(position, len(self.rows))
            text, label, datasource, solution = self.rows[self._order(episode)[offset]]
            prompts.append(Prompt(position, text, label, datasource, solution))
        self.position += count
        return prompts

    def _order(self, episode: int) -> list[int]:
        if self._cached[0] != episode:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + episode)
            self._cached = (episode, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._cached[1]

    def state_dict(self) -> dict:
        return {"position": self.position, "num_rows": len(self.rows)}

    def load_state_dict(self, state: dict) -> None:
        if state["num_rows"] != len(self.rows):
            raise DataError(
                f"the checkpoint was made with {state['num_rows']} prompts, the data set now has {len(self.rows)}: "
                "resume with the data and filters of the first run, or start anew in another --ckpt.path"
            )
        self.position = state["position"]
