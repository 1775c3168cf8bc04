"""When a checkpoint is written, and which one is the best so far."""

import logging
import shutil
from typing import Protocol

from openrlhf_apo.errors import ProcessDied, RunError, in_one_line
from openrlhf_apo.trainer.checkpoint_folder import CheckpointFolder, complete_checkpoints
from openrlhf_apo.trainer.handles import PolicyHandle
from openrlhf_apo.trainer.metrics import as_score

logger = logging.getLogger(__name__)

FULL = 1 << 20  # bytes that a full disk may still have


class Stateful(Protocol):
    """A part of a run that a checkpoint holds."""

    def state_dict(self) -> dict:
        """JSON-able."""

    def load_state_dict(self, state: dict) -> None:
        """Continue where `state_dict` was taken."""


class Checkpoints:
    """Every `every` rollouts (None: never), as `global_step<n>`; and, as in OpenRLHF, after an evaluation that is
    better than all before, as `best_global_step<n>`.

    best_key: the metric that decides; "" takes eval/pass1, "none" keeps no best. Of graded rewards, eval/pass1 is
    eval/score_mean (metrics.py), and either name means what there is. The metric goes with every checkpoint: where
    --ckpt.max_num removes one, it is the worst. folder: None where there is nothing to resume from
    (--ckpt.disable_ds); then the policy's own files are all there is.
    """

    def __init__(self, policy: PolicyHandle, folder: CheckpointFolder | None, every: int | None, best_key: str):
        self.policy, self.folder, self.every, self.best_key = policy, folder, every, best_key or "eval/pass1"
        self._state: dict = {"best": None, "latest": None}  # values of the metric
        self.newest: int | None = None  # the rollout after which this run wrote its last one

    def after_rollout(self, rollout: int, row: dict, state: dict) -> None:
        """row: the rollout's line of metrics.jsonl, on disk by now, so that a checkpoint never knows more than it."""
        key = next((key for key in row if as_score(key) == as_score(self.best_key)), self.best_key)
        value = row.get(key)
        if value is not None:
            self._state["latest"] = value
        elif self.best_key != "none" and any(name.startswith("eval/") for name in row):
            logger.warning(
                "the evaluation has no %s (--ckpt.best_metric_key): no best checkpoint is kept", self.best_key
            )
        if self.every is not None and rollout % self.every == 0:
            self.save(rollout, state)
        if value is not None and (self._state["best"] is None or value > self._state["best"]):
            self._state["best"] = value
            self.save(rollout, state, "best_")
            logger.info("best checkpoint so far: %s %.4f after rollout %d", key, value, rollout)

    def save(self, rollout: int, state: dict, prefix: str = "") -> None:
        """RunError, one line, for one that cannot be written, and ProcessDied; those before stay."""
        tag, state = f"{prefix}global_step{rollout}", state | {"checkpoints": self.state_dict()}
        if self.folder is None:
            self.policy.save_checkpoint(tag, state)
            return
        root = self.folder.root
        try:
            self.folder.begin(tag)
            self.policy.save_checkpoint(tag, state)
            self.folder.finish(tag, rollout, self._state["latest"])
        except ProcessDied:  # which says more than that this was not written
            raise
        except Exception as error:  # of a file system, of torch's writer or of an actor
            whole = complete_checkpoints(root)
            before = f"the newest whole one is {whole[0].folder.name}" if whole else "there is none before"
            full = root.exists() and shutil.disk_usage(root).free < FULL
            reason = "the disk is full" if full else in_one_line(_cause(error))
            raise RunError(f"the checkpoint {root / tag} cannot be written ({reason}); {before}") from error
        self.newest = rollout

    def state_dict(self) -> dict:
        return dict(self._state)

    def load_state_dict(self, state: dict) -> None:
        self._state = dict(state)


def _cause(error: BaseException) -> BaseException:
    """What the system said, where torch's writer only says that its file is too short."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__context__
    return error
