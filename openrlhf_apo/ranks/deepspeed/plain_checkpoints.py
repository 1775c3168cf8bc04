"""DeepSpeed's checkpoints read as weights and numbers: a pickle that someone sent runs no code here."""

import pickle

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from openrlhf_apo.errors import RunError

# What DeepSpeed itself puts beside tensors and plain Python.
OWN_TYPES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


class PlainCheckpoints(TorchCheckpointEngine):
    """In place of DeepSpeed's own reader, whose torch.load has weights_only=False (torch_checkpoint_engine.py:40)."""

    def load(self, path: str, map_location=None):
        """Raises RunError for a file that holds anything else."""
        try:
            with torch.serialization.safe_globals(OWN_TYPES):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            what = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
            raise RunError(
                f"{path} holds more than weights and numbers, so it is not this trainer's, and reading it could run "
                f"its code: {what.strip() or 'it cannot be read as weights only'}"
            ) from None
