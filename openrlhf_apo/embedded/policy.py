"""The policy in this process: one rank, which holds everything."""

import os
from collections.abc import Callable

from openrlhf_apo.cpu.patches import without_deepspeed
from openrlhf_apo.embedded.backend import TorchBackend
from openrlhf_apo.embedded.checkpoints import CheckpointFolder
from openrlhf_apo.ranks.learner import Learner
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.sharded_policy import ShardedPolicy


class EmbeddedPolicy(ShardedPolicy):
    """PolicyHandle. output: where the trained model goes. resume: go on from the latest checkpoint, where there is
    one."""

    def __init__(
        self,
        backend: TorchBackend,
        tokenizer,
        *,
        limit: MicroBatchLimit,
        kl_estimator: str,
        entropy: bool,
        checkpoints: CheckpointFolder,
        output: str,
        resume: bool,
    ):
        super().__init__(1, limit)
        self.backend, self.tokenizer, self.checkpoints, self.output = backend, tokenizer, checkpoints, output
        self.learner = Learner(backend, tokenizer.pad_token_id, kl_estimator, entropy)
        loaded = checkpoints.load() if resume else None
        self._trainer_state: dict = {}
        if loaded is not None:
            backend.load_state_dict(loaded["backend"])
            self._trainer_state = loaded["trainer"]

    def call_ranks(self, method: str, arguments: Callable[[int], tuple]) -> list:
        return [getattr(self.learner, method)(*arguments(0))]

    def save_checkpoint(self, tag: str, trainer_state: dict, metric: tuple[str, float] | None = None) -> None:
        self.checkpoints.save(tag, {"backend": self.backend.state_dict(), "trainer": trainer_state}, metric)

    def trainer_state(self) -> dict:
        return self._trainer_state

    def save_model(self) -> None:
        os.makedirs(self.output, exist_ok=True)
        with without_deepspeed():
            self.backend.model.save_pretrained(self.output)
        self.tokenizer.save_pretrained(self.output)
