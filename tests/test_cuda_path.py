"""The CUDA path without a GPU: what can be held by fakes and by what a process imports."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from openrlhf_apo import cpu
from openrlhf_apo.trainer.completions import Completion, Request
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.placement import Placement
from openrlhf_apo.trainer.samples import Prompt

pytestmark = pytest.mark.filterwarnings("ignore")


def run(code: str, device: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        # Without what an earlier test of this process may have set for a CPU.
        env={k: v for k, v in os.environ.items() if k not in cpu.CPU_ENVIRONMENT} | {cpu.DEVICE: device},
    )
    assert result.returncode == 0, result.stderr


def test_the_driver_decides_and_a_process_without_a_visible_gpu_follows():
    """Ray sets CUDA_VISIBLE_DEVICES to nothing for the engine's actor under tensor parallelism."""
    code = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "import torch\n"
        "before = torch.cuda.current_device, torch.cuda.synchronize\n"
        "from openrlhf_apo import cpu\n"
        "cpu.install_for_ranks()\n"
        "assert cpu.has_cuda() == {cuda} and not torch.cuda.is_available()\n"
        "assert ((torch.cuda.current_device, torch.cuda.synchronize) == before) == {cuda}\n"
        "assert ('DS_ACCELERATOR' in os.environ) == (not {cuda})\n"
    )
    run(code.format(cuda=True), "cuda")
    run(code.format(cuda=False), "cpu")


def test_the_flag_decides_over_what_the_driver_sees(monkeypatch):
    cpu.decide("auto")
    assert not cpu.has_cuda()
    cpu.decide("cuda")
    assert cpu.has_cuda()
    cpu.decide("auto")  # anew, not by what was decided before
    assert not cpu.has_cuda()


def test_an_engines_process_imports_no_deepspeed():
    run("import sys, openrlhf_apo.cluster.engine\nassert 'deepspeed' not in sys.modules", "cpu")


class Recorder:
    """Stands for actors: notes who was called, in order."""

    def __init__(self, calls: list, name: str):
        self.calls, self.name = calls, name

    def __getattr__(self, method: str):
        def call(*arguments):
            self.calls.append(f"{self.name}.{method}")
            if method == "generate":
                return [[Completion([1], [-1.0], False)] for _ in arguments[0]]
            if method == "complete":
                return [Completion([request.seed], [-1.0], False) for request in arguments[0]]
            return None

        call.remote = call
        return call


@pytest.fixture
def calls(monkeypatch) -> list:
    from openrlhf_apo.cluster import engine

    monkeypatch.setattr(engine, "get_all", lambda refs, timeout, what: refs)
    return []


class OneToken:
    """A tokenizer."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1]}

    def decode(self, ids, skip_special_tokens):
        return "x"


def sleeping_engine(calls: list):
    from openrlhf_apo.cluster.engine import EnginePlan, RayEngine

    plan = EnginePlan("m", 2, 1, "bf16", 64, 0, False, False, True, 0.5, False, 1.0, False, False)
    engines = [Recorder(calls, "engine0"), Recorder(calls, "engine1")]
    return RayEngine(engines, None, Recorder(calls, "policy"), OneToken(), plan)


def test_the_policys_cached_memory_is_given_back_before_the_engine_wakes(calls):
    engine = sleeping_engine(calls)
    engine.generate([Prompt(0, "a", "", ""), Prompt(1, "b", "", "")], SamplingSettings(1, 1.0, 1.0, 4, 64, 0))
    assert calls == [
        *("policy.release_memory", "engine0.wake_up", "engine1.wake_up"),
        *("engine0.generate", "engine1.generate", "engine0.sleep", "engine1.sleep"),
    ]


def test_the_engines_sleep_after_the_last_turn_and_one_without_a_conversation_is_not_asked(calls):
    engine = sleeping_engine(calls)
    answers = engine.complete([Request([1], seed, 1.0, 1.0, 4) for seed in range(3)])
    assert [answer.ids for answer in answers] == [[0], [1], [2]]  # in their order, though dealt out
    engine.complete([Request([1], 0, 1.0, 1.0, 4)])
    engine.rest()
    assert [call for call in calls if "complete" in call or "sleep" in call] == [
        *("engine0.complete", "engine1.complete", "engine0.complete", "engine0.sleep", "engine1.sleep"),
    ]
    assert calls[-4:] == ["engine0.wake_up", "engine1.wake_up", "engine0.sleep", "engine1.sleep"]  # all of it sleeps
    assert calls[:3] == ["policy.release_memory", "engine0.wake_up", "engine1.wake_up"]


def test_only_the_engines_weights_wake_for_a_sync(calls, monkeypatch):
    cpu.decide("cuda")
    sleeping_engine(calls).sync_weights()
    assert calls[:2] == ["policy.sleep", "policy.release_memory"]
    assert calls[2:] == ["engine0.wake_up", "engine1.wake_up", "policy.call_actors"]


@pytest.mark.parametrize("sleeps", [True, False])
def test_the_optimizers_states_are_on_the_gpu_only_while_a_rollout_is_trained_on(sleeps, monkeypatch):
    from openrlhf_apo.cluster.policy import RayPolicy

    calls = []
    actor = Recorder(calls, "actor")
    group = SimpleNamespace(_actor_handlers=[actor], duplicate_actors=1)
    monkeypatch.setattr("openrlhf_apo.cluster.policy.get_all", lambda refs, timeout, what: refs)
    policy = RayPolicy(group, MicroBatchLimit(samples=1), 1.0, sleeps)
    policy.load_steps([])
    policy.sleep()
    assert calls == (["actor.reload_states", "actor.learn", "actor.offload_states"] if sleeps else ["actor.learn"])


@pytest.mark.parametrize("stage, sleeps, torchs", [(3, True, False), (2, True, True), (3, False, True)])
def test_zero_3_sleeps_with_deepspeeds_own_adam(stage, sleeps, torchs, monkeypatch):
    """stage3.py: "Offloading is supported only for DeepSpeed FusedAdam"."""
    from spmd import settings as rank_settings

    from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy, RankPlan

    args = rank_settings({"step_size": 8}, stage)
    args.ds.enable_sleep = sleeps
    optimizer = {"type": "AdamW", "params": {}}
    ApoStrategy(args, RankPlan()).get_ds_train_config(optimizer)
    assert ("torch_adam" in optimizer["params"]) == torchs


@pytest.mark.parametrize(
    "device, colocated, sender",
    [
        ("cpu", False, ("ObjectStore",)),
        ("cuda", True, ("CudaIpc",)),
        ("cuda", False, ("Broadcast", 2, "nccl")),
    ],
)
def test_the_way_of_the_buckets_follows_the_device_and_the_placement(device, colocated, sender, calls):
    from openrlhf_apo.cluster import engine

    cpu.decide(device)
    policy = SimpleNamespace(
        call_actors=lambda method, *arguments: calls.append((method, *arguments)), sleep=lambda: None
    )
    member = Recorder(calls, "engine")
    plan = engine.EnginePlan("m", 1, 2, "bf16", 64, 0, False, False, False, 0.5, False, 1.0, colocated, True)
    engine.RayEngine([member], None, policy, OneToken(), plan).sync_weights()
    name, *arguments = sender
    connected = ("connect_engines", getattr(engine, name), [member], *arguments)
    assert calls == [connected, ("send_weights",), "engine.workers"]  # the last of which finishes the sync


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_an_address_ray_is_local_and_on_loopback(device, monkeypatch):
    from openrlhf_apo.cluster import start

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    environment = {"PATH": os.environ["PATH"]}  # inherited by all of Ray's processes
    monkeypatch.setattr(os, "environ", environment)
    cpu.decide(device)
    seen = {}
    monkeypatch.setattr(start.ray, "init", lambda **settings: seen.update(settings))
    monkeypatch.setattr(start.ray, "cluster_resources", lambda: {"GPU": 2})
    start.start_ray(settings(), Placement(1, 1, 0, 0))
    assert seen["address"] == "local" and seen["_node_ip_address"] == "127.0.0.1"
    assert environment[cpu.DEVICE] == device
    assert ("PYTORCH_NVML_BASED_CUDA_CHECK" in environment) == (device == "cuda")
    assert ("num_gpus" in seen) == (device == "cpu")  # with CUDA, Ray counts the real ones
    if device == "cpu":  # a worker for each actor, kept until the actor comes, with imports that need no DeepSpeed
        assert seen["num_cpus"] == seen["_system_config"]["num_workers_soft_limit"] == 2
        assert seen["_system_config"]["preload_python_modules"] == ["openrlhf_apo.cluster.engine"]


def test_a_driver_without_a_gpu_does_not_plan_a_cpu_run_for_a_cluster_of_gpus(monkeypatch):
    from openrlhf_apo.cluster import start
    from openrlhf_apo.errors import RunError

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    cpu.decide("auto")
    monkeypatch.setattr(start.ray, "init", lambda **settings: None)
    monkeypatch.setattr(start.ray, "cluster_resources", lambda: {"GPU": 8, "accelerator_type:H100": 1})
    with pytest.raises(RunError, match="--apo.device cuda"):
        start.start_ray(settings(), Placement(1, 1, 0, 0))


def settings() -> SimpleNamespace:
    return SimpleNamespace(
        actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=1), logger=SimpleNamespace(actor_logs=False)
    )
