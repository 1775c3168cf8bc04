"""Where a run's processes go on a cluster: the recipes of configs/cluster, placed by a Ray that believes in GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_apo import cpu
from openrlhf_apo.options import resolve
from openrlhf_apo.options.placement import placement

ROOT = Path(__file__).parents[1]
# Two raylets on this machine, of 8 GPUs each by their own account; argv: the GPUs of each placement group.
PLACED = """
import json, sys
import ray
from openrlhf.trainer.ray.utils import get_bundle_indices
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from openrlhf_apo.cluster.launch import place
from openrlhf_apo.trainer.placement import Placement

nodes, engines, size, parts = json.loads(sys.argv[1])
cluster = Cluster()
for i in range(nodes):  # no worker for each of the CPUs, which are made up, too
    first = {"_system_config": {"prestart_worker_first_driver": False}} if i == 0 else {}
    cluster.add_node(num_gpus=8, num_cpus=8, **first)
ray.init(address=cluster.address, logging_level="error")
try:
    found = {}
    for part, group in place(Placement(**parts), 30.0).items():
        table = placement_group_table(group)
        node_of = table["bundles_to_node_id"]
        names = {name: str(k) for k, name in enumerate(sorted(set(node_of.values())))}
        found[part] = [names[node_of[i]] for i in sorted(node_of)]
        if part == "engines":
            found["bundles"] = [sorted(get_bundle_indices(group, i, size)) for i in range(engines)]
    print(json.dumps(found))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.fixture
def args(tiny_model, sums, monkeypatch):
    def settings(recipe):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        argv = ["--config", str(ROOT / "configs/cluster" / recipe), "--actor.model_name_or_path", tiny_model]
        return resolve([*argv, "--data.prompt_dataset", sums, "--ds.attn_implementation", "sdpa"])

    yield settings
    cpu.decide("auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, nodes, groups, said",
    [
        ("colocated_1x8.yaml", 1, {"policy": 8}, "policy 8 GPUs; engines on the policy's"),
        ("colocated_2x8.yaml", 2, {"policy": 16}, "policy 16 GPUs; engines on the policy's"),
        ("apart_2x8.yaml", 2, {"policy": 8, "engines": 8}, "policy 8 GPUs, engines 8 GPUs"),
    ],
)
def test_a_recipe_is_placed_as_it_says(recipe, nodes, groups, said, args):
    settings = args(recipe)
    where, size = placement(settings), settings.vllm.tensor_parallel_size
    assert where.groups == groups and str(where) == said
    parts = {name: getattr(where, name) for name in ("policy", "engines", "reference", "reward", "shared")}
    job = json.dumps([nodes, settings.vllm.num_engines, size, parts])
    result = subprocess.run([sys.executable, "-c", PLACED, job], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    policy, engines, bundles = found["policy"], found["engines"], found["bundles"]
    assert [policy.count(node) for node in sorted(set(policy))] == [8] * (len(policy) // 8)
    if "engines" in groups:  # a machine each
        assert len(set(engines)) == 1
    for engine in bundles:  # an engine's GPUs are on one machine
        assert len(engine) == size and len({engines[i] for i in engine}) == 1
    assert sorted(i for engine in bundles for i in engine) == list(range(where.engines))


def test_parts_that_share_ask_for_nothing(args):
    settings = args("apart_2x8.yaml")
    settings.loss, settings.algo.kl.init_coef = "openrlhf", 0.01
    settings.ref.num_nodes, settings.ref.num_gpus_per_node = 1, 8
    assert placement(settings).groups == {"policy": 8, "engines": 8, "reference": 8}
    settings.train.colocate_actor_ref = True
    assert placement(settings).groups == {"policy": 8, "engines": 8}
    settings.apo.load_rollouts = "folder"
    assert placement(settings).groups == {"policy": 8}
