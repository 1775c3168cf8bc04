"""When a checkpoint is written, and which one is the best so far."""

import logging
from typing import Protocol

from openrlhf_apo.trainer.handles import PolicyHandle

logger = logging.getLogger(__name__)

EMBEDDED_FILE = "embedded.pt"  # in a checkpoint of the embedded runtime, by which the other one knows it


class Stateful(Protocol):
    """A part of a run that a checkpoint holds."""

    def state_dict(self) -> dict:
        """JSON-able."""

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""


class Checkpoints:
    """Every `every` rollouts (None: never), as `global_step<n>`; and, as in OpenRLHF, after an evaluation that is
    better than all before, as `best_global_step<n>`.

    best_key: the metric that decides; "" takes eval/pass1, "none" keeps no best. The metric goes with every
    checkpoint: where --ckpt.max_num removes one, it is the worst.
    """

    def __init__(self, policy: PolicyHandle, every: int | None, best_key: str):
        self.policy, self.every, self.best_key = policy, every, best_key or "eval/pass1"
        self._state: dict = {"best": None, "latest": None}  # values of the metric

    def after_rollout(self, rollout: int, row: dict, state: dict) -> None:
        """row: the rollout's line of metrics.jsonl, on disk by now, so that a checkpoint never knows more than it."""
        value = row.get(self.best_key)
        if value is not None:
            self._state["latest"] = value
        if self.every is not None and rollout % self.every == 0:
            self._save(f"global_step{rollout}", state)
        if value is not None and (self._state["best"] is None or value > self._state["best"]):
            self._state["best"] = value
            self._save(f"best_global_step{rollout}", state)
            logger.info("best checkpoint so far: %s %.4f after rollout %d", self.best_key, value, rollout)

    def _save(self, tag: str, state: dict) -> None:
        latest = self._state["latest"]
        metric = None if latest is None else (self.best_key, latest)
        self.policy.save_checkpoint(tag, state | {"checkpoints": self.state_dict()}, metric)

    def state_dict(self) -> dict:
        return dict(self._state)

    def load_state_dict(self, state: dict) -> None:
        self._state = dict(state)
