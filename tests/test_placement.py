"""Where a run's processes go on a cluster: the recipes of configs/cluster, placed by a Ray that believes in GPUs."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from openrlhf_apo import cpu
from openrlhf_apo.options import resolve
from openrlhf_apo.options.placement import placement

ROOT = Path(__file__).parents[1]
RECIPES = {
    "colocated_1x8.yaml": ({"policy": 8}, "policy 8 GPUs; engines on the policy's"),
    "colocated_2x8.yaml": ({"policy": 16}, "policy 16 GPUs; engines on the policy's"),
    "apart_2x8.yaml": ({"policy": 8, "engines": 8}, "policy 8 GPUs, engines 8 GPUs"),
}
# Two raylets on this machine, of 8 GPUs each by their own account. argv: {recipe: [engines, size of one, placement]}.
PLACED = """
import json, sys
import ray
from openrlhf.trainer.ray.utils import get_bundle_indices
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group
from openrlhf_apo.cluster.bundles import place
from openrlhf_apo.trainer.placement import Placement

cluster = Cluster()
# No worker for each of the CPUs, which are made up, too.
idle = {"prestart_worker_first_driver": False}
cluster.add_node(num_gpus=8, num_cpus=8, include_dashboard=False, _system_config=idle)
cluster.add_node(num_gpus=8, num_cpus=8)
ray.init(address=cluster.address, logging_level="error")
found = {}
for recipe, (engines, size, parts) in json.loads(sys.argv[1]).items():
    places = place(Placement(**parts), 60.0)
    nodes = {part: placement_group_table(group)["bundles_to_node_id"] for part, group in places.items()}
    bundles = [sorted(get_bundle_indices(places["engines"], i, size)) for i in range(engines)]
    found[recipe] = {part: [of[i] for i in sorted(of)] for part, of in nodes.items()} | {"bundles": bundles}
    for group in set(places.values()):
        remove_placement_group(group)
print(json.dumps(found))
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
def test_the_recipes_are_placed_as_they_say(args):
    jobs = {}
    for recipe, (groups, said) in RECIPES.items():
        settings = args(recipe)
        where = placement(settings)
        assert where.groups == groups and str(where) == said
        jobs[recipe] = [settings.vllm.num_engines, settings.vllm.tensor_parallel_size, asdict(where)]
    result = subprocess.run(
        [sys.executable, "-c", PLACED, json.dumps(jobs)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for recipe, found in json.loads(result.stdout.splitlines()[-1]).items():
        engines, size, _ = jobs[recipe]
        policy, of_engines, bundles = found["policy"], found["engines"], found["bundles"]
        assert sorted(policy.count(node) for node in set(policy)) == [8] * (len(policy) // 8), recipe
        if recipe == "apart_2x8.yaml":
            assert len(set(policy)) == len(set(of_engines)) == 1 and policy[0] != of_engines[0]
        for engine in bundles:  # its GPUs are on one machine
            assert len(engine) == size and len({of_engines[i] for i in engine}) == 1, recipe
        assert sorted(i for engine in bundles for i in engine) == list(range(engines * size)), recipe


def test_parts_that_share_ask_for_nothing(args):
    settings = args("apart_2x8.yaml")
    settings.loss, settings.algo.kl.init_coef = "openrlhf", 0.01
    settings.ref.num_nodes, settings.ref.num_gpus_per_node = 1, 8
    assert placement(settings).groups == {"policy": 8, "engines": 8, "reference": 8}
    settings.train.colocate_actor_ref = True
    assert placement(settings).groups == {"policy": 8, "engines": 8}
    settings.apo.load_rollouts = "folder"
    assert placement(settings).groups == {"policy": 8}
