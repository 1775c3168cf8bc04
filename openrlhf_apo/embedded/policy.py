"""The policy in this process: one rank, which holds everything."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from openrlhf_apo.cpu.patches import without_deepspeed
from openrlhf_apo.embedded.backend import TorchBackend
from openrlhf_apo.errors import RunError
from openrlhf_apo.ranks.learner import Learner
from openrlhf_apo.trainer.checkpoint_folder import EMBEDDED_FILE, Checkpoint
from openrlhf_apo.trainer.handles import EMA_FOLDER, Behavior
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.sharded_policy import ShardedPolicy


class EmbeddedPolicy(ShardedPolicy):
    """PolicyHandle. checkpoints: --ckpt.path. output: where the trained model goes; with LoRA its adapter, or with
    `merge_lora` the whole. resume: the checkpoint to go on from."""

    def __init__(
        self,
        backend: TorchBackend,
        tokenizer,
        *,
        limit: MicroBatchLimit,
        kl_estimator: str,
        entropy: bool,
        behavior: Behavior,
        checkpoints: str,
        output: str,
        merge_lora: bool,
        resume: Checkpoint | None,
    ):
        super().__init__(1, limit)
        self.backend, self.tokenizer, self.output = backend, tokenizer, output
        self.merge_lora = merge_lora
        self.checkpoints = Path(checkpoints) / "_actor"
        self.learner = Learner(backend, tokenizer.pad_token_id, kl_estimator, entropy, behavior)
        self._trainer_state: dict = {}
        if resume is not None:
            if not resume.embedded:
                raise RunError(
                    f"the checkpoint {resume.folder} is one of --runtime ray: go on with that, or start anew"
                )
            loaded = torch.load(resume.folder / EMBEDDED_FILE, map_location="cpu", weights_only=True)
            backend.load_state_dict(loaded["backend"])
            self._trainer_state = loaded["trainer"]

    def call_ranks(self, method: str, arguments: Callable[[int], tuple]) -> list:
        return [getattr(self.learner, method)(*arguments(0))]

    def save_checkpoint(self, tag: str, trainer_state: dict) -> None:
        with open(self.checkpoints / tag / EMBEDDED_FILE, "wb") as file:  # a file of Python's says why it cannot write
            torch.save({"backend": self.backend.state_dict(), "trainer": trainer_state}, file)

    def trainer_state(self) -> dict:
        return self._trainer_state

    def save_model(self) -> None:
        self._save("policy", self.output)
        if "ema" in self.backend.models:
            self._save("ema", os.path.join(self.output, EMA_FOLDER))

    def _save(self, weights: str, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        with without_deepspeed():
            if self.backend.adapter is None:
                self.backend.models[weights].save_pretrained(folder)
            else:
                from openrlhf_apo.ranks.lora import save_trained  # imports peft

                save_trained(self.backend.model, folder, self.merge_lora)
        self.tokenizer.save_pretrained(folder)
