"""Guidance: a share of each group starts from the beginning of a reference solution, beside any loss.

The first g tokens of the solution follow the prompt, and the policy goes on from there. g adapts to the accuracy a_k
of the last three rollouts, every third rollout:

    abar = (a_{k-2} + a_{k-1}) / 2
    g <- min(g abar / a_k, g_max)          where accuracy fell, a_k < abar
    g <- max(floor(g abar / a_k), 1)       where it rose
    g unchanged                            where it did not move, or either is 0

Guided tokens are context, and no loss acts on them: pi_old did not sample them, so they have no importance ratio. (The
public code trains on them as well.)

Reference: G2RPO-A, arXiv 2508.13023, and its public code: 2 of 12 answers are guided, by 3072 tokens at first and at
most. At least the last fifth of a solution stays hidden, so that the answer is not given away.
"""

from dataclasses import dataclass

from openrlhf_apo.settings import Checked, setting

CYCLE = 3  # rollouts per adaptation
MOST_SHOWN = 0.8  # of a solution's tokens


@dataclass(eq=False)
class Guidance(Checked):
    share: float = setting(1 / 6, "share of a group's answers that is guided, at least one answer", within="(0, 1)")
    length: int = setting(3072, "tokens of guidance at first and at most", within="[1, inf)")
    solution_key: str = setting("solution", "column of the data with the reference solutions")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._state: dict = {"length": self.length, "accuracies": []}

    @property
    def tokens(self) -> int:
        """g of the next rollout."""
        return self._state["length"]

    def guided(self, group_size: int) -> int:
        """How many of a group's answers are guided."""
        return max(1, min(round(self.share * group_size), group_size - 1))

    def prefix(self, solution_ids: list[int]) -> list[int]:
        """The tokens shown of a solution."""
        return solution_ids[: min(self.tokens, int(MOST_SHOWN * len(solution_ids)))]

    def step(self, accuracy: float) -> None:
        """accuracy: the mean reward of a rollout, over all its answers. Adapts g at every third call."""
        *before, now = accuracies = [*self._state["accuracies"], accuracy]
        length = self.tokens
        if len(accuracies) == CYCLE:
            mean, accuracies = sum(before) / len(before), []
            if now > 0 and mean > 0:
                change = mean / now  # first, so that it is exactly 1 where accuracy did not move
                length = min(int(length * change), self.length) if now < mean else max(int(length * change), 1)
        self._state = {"length": length, "accuracies": accuracies}

    def state_dict(self) -> dict:
        return dict(self._state)

    def load_state_dict(self, state: dict) -> None:
        self._state = dict(state)
