"""Weights in buckets: what is packed arrives, by every way that needs no GPU, and what did not come is named."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from ray.exceptions import ActorDiedError

from openrlhf_apo.cluster import weight_sync
from openrlhf_apo.cluster.buckets import bounded_runs, pack, unpack
from openrlhf_apo.cluster.vllm_worker import WeightWorker
from openrlhf_apo.cluster.weight_check import refuse_unwritten, unwritten
from openrlhf_apo.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ([], []),
        ([4, 4, 4], [[0, 1], [2]]),
        ([10, 1], [[0], [1]]),
        ([11, 1, 2], [[0], [1, 2]]),
        ([1, 11, 1], [[0], [1], [2]]),
        ([5, 5, 0, 10], [[0, 1, 2], [3]]),
    ],
)
def test_runs_are_bounded_by_ten(sizes, expected):
    assert [list(run) for run in bounded_runs(sizes, 10)] == expected


def test_what_is_packed_comes_out_again():
    weights = [
        ("odd", torch.randn(3).bfloat16()),  # 6 bytes: the next does not lie on a multiple of 4 by itself
        ("wide", torch.randn(2, 5, dtype=torch.float64)),
        ("scalar", torch.tensor(2.5)),
        ("turned", torch.randn(4, 3).T),
        ("empty", torch.zeros(0, 4)),
        ("mask", torch.tensor([True, False, True])),
    ]
    unpacked = unpack(*pack(weights, "cpu"))
    assert [name for name, _ in unpacked] == [name for name, _ in weights]
    for (_, weight), (_, other) in zip(weights, unpacked, strict=True):
        assert weight.dtype == other.dtype and weight.shape == other.shape and torch.equal(weight, other)


class FakeModel(torch.nn.Module):
    """Loads as vLLM's models do, and says what it wrote."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self):
        super().__init__()
        self.weights = {}
        self.norm = torch.nn.Linear(2, 2, bias=False)
        self.lm_head = torch.nn.Linear(2, 2, bias=False)

    def load_weights(self, weights):
        weights = {name: weight.clone() for name, weight in weights}
        self.weights |= weights
        return set(weights)


def worker(rank: int = 0, tied: bool = False) -> WeightWorker:
    """One of a vLLM engine, as far as a sync sees it."""
    made = WeightWorker()
    made.rank, made.device = rank, torch.device("cpu")
    made.model_runner = SimpleNamespace(model=FakeModel())
    made.model_config = SimpleNamespace(hf_text_config=SimpleNamespace(tie_word_embeddings=tied))
    return made


class Engine:
    """An engine of some workers, whose calls run beside the caller's, as Ray's do."""

    def __init__(self, workers: list[WeightWorker], pool: ThreadPoolExecutor):
        self.members, self.pool, self.workers = workers, pool, self
        self.calls = []

    def remote(self, method: str, *arguments):
        self.calls.append(method)
        return [self.pool.submit(getattr(member, method), *arguments) for member in self.members]


@pytest.fixture
def ray(monkeypatch):
    def get(calls):
        return [[each.result(60) for each in call] for call in calls]

    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(get=get, put=lambda value: value, util=util))


WEIGHTS = [("norm.weight", torch.randn(7)), ("lm_head.weight", torch.randn(5, 3).bfloat16())]


@pytest.mark.parametrize("way", ["object store", "gloo"])
def test_every_worker_of_every_engine_loads_the_buckets(way, ray):
    members = [worker(rank) for _ in range(2) for rank in range(2)]
    with ThreadPoolExecutor(8) as pool:
        engines = [Engine(members[:2], pool), Engine(members[2:], pool)]
        sender = (
            weight_sync.ObjectStore(engines) if way == "object store" else weight_sync.Broadcast(engines, 2, "gloo")
        )
        for weights in WEIGHTS[:1], WEIGHTS[1:]:
            sender.send(*pack(weights, sender.device))
        expected = ["load_bucket"] * 2 if way == "object store" else ["join_sync_group"] + ["receive_bucket"] * 2
        assert engines[0].calls == engines[1].calls == expected  # one call per bucket
    for member in members:
        loaded = member.model_runner.model.weights
        assert list(loaded) == [name for name, _ in WEIGHTS]
        assert all(torch.equal(loaded[name], weight) for name, weight in WEIGHTS)
        assert member.unwritten_weights() == []


@pytest.mark.parametrize("died, error", [(True, ActorDiedError), (False, RuntimeError)])
def test_an_engine_that_dies_in_a_broadcast_is_what_the_sync_ends_with(died, error, monkeypatch):
    def closed(buffer, group):
        raise RuntimeError("Connection closed by peer")

    def get(calls):
        if died:
            raise ActorDiedError()

    sender = weight_sync.Broadcast.__new__(weight_sync.Broadcast)
    sender.group, sender.engines = None, [SimpleNamespace(workers=SimpleNamespace(remote=lambda *call: None))]
    monkeypatch.setattr(weight_sync, "broadcast", closed)
    monkeypatch.setattr(weight_sync, "ray", SimpleNamespace(get=get))
    with pytest.raises(error):
        sender.send([], torch.zeros(1))


def test_a_weight_that_no_bucket_wrote_is_named():
    member = worker()
    member.load_bucket(*pack(WEIGHTS[:1], "cpu"))
    assert member.unwritten_weights() == ["lm_head.weight"]
    assert member.unwritten_weights() == ["norm.weight", "lm_head.weight"]  # each sync counts by itself
    with pytest.raises(RunError, match="no bucket of the weight sync wrote the engine's lm_head.weight"):
        refuse_unwritten(["lm_head.weight"])
    refuse_unwritten([])
    tied = worker(tied=True)
    tied.load_bucket(*pack(WEIGHTS[:1], "cpu"))
    assert tied.unwritten_weights() == []


def test_a_fused_weight_of_which_a_part_did_not_come_is_named():
    names, packed = ["a.qkv_proj.weight", "a.experts.w13_weight"], FakeModel.packed_modules_mapping
    parts = {f"a.{part}_proj.weight" for part in "qkv"}
    assert unwritten(names, parts, set(names), packed) == []
    assert unwritten(names, parts - {"a.v_proj.weight"}, set(names), packed) == ["a.qkv_proj.weight"]
    assert unwritten(names, parts, {"a.qkv_proj.weight"}, packed) == ["a.experts.w13_weight"]


ZERO3 = """
import sys
from datetime import timedelta
from types import SimpleNamespace
import torch, torch.distributed as dist
from ray.exceptions import ActorDiedError, RayError
from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy, RankPlan
from spmd import ADAM, settings
from openrlhf_apo.cluster import policy, weight_sync
from openrlhf_apo.cluster.buckets import unpack
from openrlhf.models import Actor
from transformers import AutoModelForCausalLM

class Keep:
    every_rank, device = False, "cpu"
    def __init__(self):
        self.buckets = []
    def send(self, slots, buffer):
        self.buckets.append(unpack(slots, buffer))

torch.set_num_threads(1)
policy.bucket_bytes = lambda: 50_000
path = sys.argv[1]
strategy = ApoStrategy(settings({"step_size": 8}, 3), RankPlan())
strategy.setup_distributed()
model = Actor(path, attn_implementation="sdpa", param_dtype="fp32", ds_config=strategy.get_ds_train_config())
optimizer = {"optim": "adam", "adam": ADAM | {"lr": 0.0}, "lr_scheduler": "constant", "max_norm": 0.0,
             "scheduler_steps": 100}
actor = policy.PolicyActor.__new__(policy.PolicyActor)
actor.strategy, actor.actor = strategy, strategy.prepare((model, optimizer))[0]
actor.connect_engines(Keep)
actor.send_weights()
sums = actor.weight_sums()
assert all(parameter.ds_tensor.numel() <= parameter.ds_numel for parameter in model.parameters())
if dist.get_rank() == 0:
    whole = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    buckets = actor.sender.buckets
    assert len(buckets) > 3 and max(len(bucket) for bucket in buckets) > 1
    sent = dict(weight for bucket in buckets for weight in bucket)
    assert sent.keys() == whole.keys() == sums.keys()
    wrong = [name for name in whole if not torch.equal(sent[name], whole[name])]
    assert not wrong, wrong
else:
    assert actor.sender is None and sums is None

# An engine that dies: rank 0 says so, and no rank is left waiting for another.
class Dies(Keep):
    def send(self, slots, buffer):
        super().send(slots, buffer)
        if len(self.buckets) == 2:
            raise ActorDiedError()

class Dead:
    workers = SimpleNamespace(remote=lambda *call: None)

def get(calls):
    raise ActorDiedError()

def on_rank_0_alone(sends):
    try:
        sends()
        raised = False
    except RayError:
        raised = True
    assert raised == (dist.get_rank() == 0)
    dist.monitored_barrier(timeout=timedelta(seconds=60))

actor.connect_engines(Dies)
on_rank_0_alone(actor.send_weights)
assert dist.get_rank() == 1 or len(actor.sender.buckets) == 2
torch.cuda.synchronize = torch.cuda.ipc_collect = lambda: None
weight_sync.get_physical_gpu_id, weight_sync.reduce_tensor = dist.get_rank, lambda buffer: None
weight_sync.ray = SimpleNamespace(get=get)
on_rank_0_alone(lambda: weight_sync.CudaIpc([Dead]).send([], torch.zeros(1)))
dist.destroy_process_group()
"""


def test_sharded_weights_are_gathered_bucket_by_bucket_also_when_an_engine_dies(tiny_model, tmp_path):
    run_ranks(["-c", ZERO3, tiny_model], 2, tmp_path)
