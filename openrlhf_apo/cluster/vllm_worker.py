"""What runs inside a vLLM worker: OpenRLHF's weight-sync extension, weights in buckets, and their sums."""

import torch
import torch.distributed as dist
from openrlhf.trainer.ray.utils import get_physical_gpu_id
from openrlhf.trainer.ray.vllm_worker_wrap import WorkerWrap
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from openrlhf_apo.cluster.buckets import Slot, unpack
from openrlhf_apo.cluster.weight_check import unwritten
from openrlhf_apo.cluster.weight_sync import broadcast, sync_group
from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.cpu.patches import pack_experts_again


class WeightWorker(WorkerWrap):
    # Since the last look at them: the checkpoint's names that came, and vLLM's parameters that it says it wrote.
    sent: frozenset[str] = frozenset()
    written: frozenset[str] = frozenset()
    syncing = False  # experts, which takes a beginning and an end
    sync_group: dist.ProcessGroup

    def load_bucket(self, slots: list[Slot], buffer: torch.Tensor) -> None:
        model = self.model_runner.model
        if not self.syncing and any(".experts." in name for name, _ in model.named_parameters()):
            initialize_layerwise_reload(model)
            self.syncing = True
        written = model.load_weights(unpack(slots, buffer))
        if written is None:  # some models say nothing: taken for all, as vLLM's own loader does
            written = {name for name, _ in model.named_parameters()}
        self.sent |= {slot.name for slot in slots}
        self.written |= written

    def finish_sync(self) -> None:
        """After the last bucket. vLLM may keep experts in an order of its kernels, to which it brings them now."""
        if self.syncing:
            finalize_layerwise_reload(self.model_runner.model, self.model_config)
            if not has_cuda():
                pack_experts_again(self.model_runner.model)
            self.syncing = False

    def join_sync_group(self, address: str, port: int, offset: int, world_size: int, backend: str) -> None:
        self.sync_group = sync_group(address, port, offset + self.rank, world_size, backend)

    def receive_bucket(self, slots: list[Slot], size: int) -> None:
        """size: of the buffer, bytes."""
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        broadcast(buffer, self.sync_group)
        self.load_bucket(slots, buffer)

    def load_shared_bucket(self, slots: list[Slot], handles: dict) -> None:
        """handles: by the physical GPU."""
        rebuild, arguments = handles[get_physical_gpu_id()]
        # The device's number, which is another where this process sees other GPUs.
        arguments = (*arguments[:6], self.device.index, *arguments[7:])
        self.load_bucket(slots, rebuild(*arguments))
        torch.cuda.synchronize()

    def unwritten_weights(self) -> list[str]:
        """Parameters that no bucket has written since the last call."""
        model = self.model_runner.model
        tied = self.model_config.hf_text_config.tie_word_embeddings
        names = [name for name, _ in model.named_parameters() if not (tied and name == "lm_head.weight")]
        missing = unwritten(names, self.sent, self.written, model.packed_modules_mapping)
        self.sent = self.written = frozenset()
        return missing

    def weight_sums(self) -> dict[str, tuple[float, float]]:
        """{vLLM's parameter name: (Σ w, Σ w²)} in float64."""
        return {
            name: (w.double().sum().item(), w.double().square().sum().item())
            for name, w in self.model_runner.model.named_parameters()
        }

    def packed_modules(self) -> dict[str, list[str]]:
        """{fused module: the checkpoint's modules}, e.g. qkv_proj: [q_proj, k_proj, v_proj]."""
        return self.model_runner.model.packed_modules_mapping
