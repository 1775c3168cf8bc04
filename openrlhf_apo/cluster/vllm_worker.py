"""What runs inside a vLLM worker: OpenRLHF's weight-sync extension, weights handed over whole, and their sums."""

import torch
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap


class WeightWorker(WorkerWrap):
    def load_named_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load Hugging Face-named weights that are already in this process."""
        self.model_runner.model.load_weights(weights=weights.items())

    def weight_sums(self) -> dict[str, tuple[float, float]]:
        """{vLLM's parameter name: (Σ w, Σ w²)} in float64."""
        return {
            name: (w.double().sum().item(), w.double().square().sum().item())
            for name, w in self.model_runner.model.named_parameters()
        }

    def packed_modules(self) -> dict[str, list[str]]:
        """{fused module: the checkpoint's modules}, e.g. qkv_proj: [q_proj, k_proj, v_proj]."""
        return self.model_runner.model.packed_modules_mapping
