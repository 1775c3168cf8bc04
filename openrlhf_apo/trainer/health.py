"""Stops a run that has nothing left to learn from, before it spends a night on it."""

import logging
from dataclasses import dataclass, field

from openrlhf_apo.errors import RunError

logger = logging.getLogger(__name__)

IN_A_ROW = 3  # rollouts after which what can happen once by chance is taken for lasting
NO_ENTROPY = 1e-6  # nats per token


@dataclass
class Health:
    """max_mismatch: nats per token between engine and policy. max_equal_rollouts: how many rollouts in a row may have
    equal rewards in every group; None for any number, with a warning."""

    max_mismatch: float = 1.0
    max_equal_rollouts: int | None = None
    in_a_row: dict[str, int] = field(default_factory=dict)  # sign of ill health -> rollouts

    def check(self, row: dict) -> None:
        """row: the metrics of a rollout that was trained on. RunError says what is wrong and what to look at."""
        rollout, mismatch = row["step"], row.get("rollout_mismatch", 0.0)
        if mismatch > self.max_mismatch:
            raise RunError(
                f"rollout {rollout}: engine and policy differ by {mismatch:.3g} nats per token (rollout_mismatch), "
                f"more than --apo.max_mismatch {self.max_mismatch:g}: the samples are not the policy's. Compare their "
                "weights by --apo.check_weights, and their precision"
            )
        equal = row.get("zero_variance_fraction") == 1.0
        still = not equal and not any(row.get("inner/grad_norm", [1.0]))
        masked = min(row.get("inner/is_filtered_fraction", [0.0])) == 1.0
        if self._count("masked", masked) >= IN_A_ROW:
            raise RunError(
                f"rollout {rollout}: for {IN_A_ROW} rollouts no sample was inside of --algo.advantage."
                "is_correction_threshold, and nothing was learned: widen it, or find what sets engine and policy "
                "apart (rollout_mismatch)"
            )
        if self._count("still", still) >= IN_A_ROW:
            raise RunError(
                f"rollout {rollout}: the gradient was exactly 0 for {IN_A_ROW} rollouts although rewards differ: the "
                "weights have left the range in which the model answers (see grad_norm and entropy before); go back "
                "to a checkpoint and lower --actor.adam.lr"
            )
        if self._count("sure", row["token_entropy"] < NO_ENTROPY) >= IN_A_ROW:
            raise RunError(
                f"rollout {rollout}: the entropy of the policy was 0 for {IN_A_ROW} rollouts: it gives every answer "
                "with certainty, and all answers of a group are one; go back to a checkpoint and lower "
                "--actor.adam.lr, or add --actor.entropy_coef"
            )
        self._check_equal(rollout, equal)

    def check_dropped(self, row: dict) -> None:
        """row: of a rollout of which no group is left. Where a filter dropped them, they had equal rewards."""
        if row.get("filtered_groups"):
            self._check_equal(row["step"], True)

    def _check_equal(self, rollout: int, equal: bool) -> None:
        in_a_row = self._count("equal", equal)
        if in_a_row == self.max_equal_rollouts:
            raise RunError(
                f"rollout {rollout}: every group had equal rewards for {in_a_row} rollouts "
                "(--apo.max_equal_rollouts): nothing can be learned from them; look at the reward and the prompts"
            )
        if in_a_row == IN_A_ROW:
            logger.warning(
                "rollout %d: every group had equal rewards for %d rollouts, nothing is learned from them: look at the "
                "reward and the prompts (--apo.max_equal_rollouts stops a run that goes on like this)",
                *(rollout, in_a_row),
            )

    def _count(self, sign: str, present: bool) -> int:
        self.in_a_row[sign] = self.in_a_row.get(sign, 0) + 1 if present else 0
        return self.in_a_row[sign]

    def state_dict(self) -> dict:
        return dict(self.in_a_row)

    def load_state_dict(self, state: dict) -> None:
        self.in_a_row = dict(state)
