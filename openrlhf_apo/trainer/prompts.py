"""The prompts of a run, in a seeded order that is a function of the position alone, so that a resumed run draws what
the uninterrupted one would have drawn."""

from dataclasses import dataclass, field

import torch

from openrlhf_apo.errors import DataError
from openrlhf_apo.trainer.samples import Prompt


@dataclass(frozen=True)
class PromptRow:
    """One row of a data set, as templates have made it."""

    text: str
    label: object  # as the data has it; "" where there is none
    datasource: str = "default"
    solution: str = ""

    def prompt(self, group_id: int) -> Prompt:
        return Prompt(group_id, self.text, self.label, self.datasource, self.solution)


@dataclass
class PromptStream:
    """Draws prompts for rollouts: every episode is a fresh permutation of the rows, seeded by (seed, episode)."""

    rows: list[PromptRow]
    seed: int
    episodes: int
    position: int = 0  # prompts drawn so far: the whole state
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)  # (episode, its permutation)

    def __len__(self) -> int:
        return len(self.rows) * self.episodes

    @property
    def exhausted(self) -> bool:
        return self.position >= len(self)

    @property
    def at_start_of_episode(self) -> bool:
        return self.position % len(self.rows) == 0

    def left_in_episode(self) -> int:
        """Prompts that the episode under way still has; a whole episode's at the start of one."""
        return 0 if self.exhausted else len(self.rows) - self.position % len(self.rows)

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts, or as many as the episode still has."""
        prompts = []
        for position in range(self.position, self.position + min(count, self.left_in_episode())):
            episode, offset = divmod(position, len(self.rows))
            prompts.append(self.rows[self._permutation(episode)[offset]].prompt(position))
        self.position += len(prompts)
        return prompts

    def _permutation(self, episode: int) -> list[int]:
        if self._order[0] != episode:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + episode)
            self._order = (episode, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._order[1]

    def state_dict(self) -> dict:
        return {"position": self.position, "num_rows": len(self.rows)}

    def load_state_dict(self, state: dict) -> None:
        if state["num_rows"] != len(self.rows):
            raise DataError(
                f"the checkpoint was made with {state['num_rows']} prompts, the data set now has {len(self.rows)}: "
                "resume with the data and filters of the first run, or start anew in another --ckpt.path"
            )
        self.position = state["position"]
