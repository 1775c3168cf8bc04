"""A real vLLM engine: it holds the weights it was given, and the check after a sync sees when it does not."""

import subprocess
import sys

import pytest
from tiny_models import save_experts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SCRIPT = """
import sys, pytest, torch
from transformers import AutoModelForCausalLM
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.errors import RunError
from openrlhf_apo.cluster.buckets import pack
from openrlhf_apo.cluster.engine import CPU_KV_CACHE_BYTES, RolloutActor, cpu_kv_cache_bytes
from openrlhf_apo.cluster.weight_check import compare_weight_sums

path, fused, experts = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
settings = {
    "model": path, "worker_extension_cls": "openrlhf_apo.cluster.vllm_worker.WeightWorker",
    "distributed_executor_backend": "uni", "dtype": "float32", "max_model_len": 64, "enforce_eager": True,
    "logprobs_mode": "processed_logprobs", "kv_cache_memory_bytes": CPU_KV_CACHE_BYTES,
}
engine = RolloutActor(None, 1, dict(settings))
# 256 sequences of a block of 128 tokens, and vLLM's own block; 2 layers, keys and values, one head of 32 floats.
assert cpu_kv_cache_bytes(settings) == 257 * 128 * 2 * 2 * 32 * 4
assert cpu_kv_cache_bytes(settings | {"kv_cache_memory_bytes": 10**6}) == 10**6
assert engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 257
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
with torch.no_grad():
    for weight in model.parameters():
        weight.add_(0.02 * torch.randn_like(weight))

def sums():
    return {n: (w.double().sum().item(), w.double().square().sum().item()) for n, w in model.named_parameters()}

def refused(words):
    with pytest.raises(RunError, match=words):
        compare_weight_sums(sums(), *engine.weight_sums())

refused("is not the policy's after a sync")
weights = [(name, w.detach()) for name, w in model.named_parameters()]
assert fused in engine.workers("unwritten_weights")[0]
for bucket in weights[:5], weights[5:]:
    engine.workers("load_bucket", *pack(bucket, "cpu"))
engine.workers("finish_sync")
assert engine.workers("unwritten_weights") == [[]]
if not experts:  # of which every sync is a whole one
    engine.workers("load_bucket", *pack([w for w in weights if "layers.1.self_attn.k_proj" not in w[0]], "cpu"))
    assert engine.workers("unwritten_weights") == [["model.layers.1.self_attn.qkv_proj.weight"]]
compare_weight_sums(sums(), *engine.weight_sums())
with torch.no_grad():
    model.model.layers[1].self_attn.k_proj.weight[3, 5] += 1e-3
refused("model.layers.1.self_attn.qkv_proj.weight")
with torch.no_grad():
    model.model.layers[1].self_attn.k_proj.weight[3, 5] -= 1e-3
    if experts:
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] += 1e-3
        refused("model.layers.1.mlp.experts.routed_experts.w2_weight")
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] -= 1e-3

def generate(temperature):
    settings = SamplingSettings(2, temperature, 1.0, 12, 64, 0)
    return engine.generate([[5, 6, 7], [8, 9]], [11, 12], settings)

assert generate(1.0) == generate(1.0), "equal seeds must give equal samples"
assert generate(1.0)[0][0].ids != generate(1.0)[0][1].ids
for prompt, completions in zip([[5, 6, 7], [8, 9]], generate(1.0)):
    for completion in completions:
        ids = torch.tensor([prompt + completion.ids])
        log_probs = model(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
        gap = (log_probs[len(prompt) - 1 :] - torch.tensor(completion.log_probs)).abs().max().item()
        assert gap < 1e-4, gap
print("all held")
"""


@pytest.mark.parametrize("experts", [False, True])
def test_engine_holds_the_weights_it_was_given(tiny_model, tmp_path, experts):
    path = save_experts(tiny_model, tmp_path) if experts else tiny_model
    fused = "experts.routed_experts.w13_weight" if experts else "gate_up_proj.weight"
    command = [sys.executable, "-c", SCRIPT, path, f"model.layers.1.mlp.{fused}", str(experts)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert "all held" in result.stdout, result.stderr[-3000:]
