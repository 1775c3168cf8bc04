"""The sums of an engine's tensors, in each of its workers, against those of the policy's weights."""

import pytest
import torch

from openrlhf_apo.cluster.weight_check import compare_weight_sums
from openrlhf_apo.errors import RunError

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HEADS, KV_HEADS, DIM, HIDDEN = 8, 2, 4, 16


def sums(weight: torch.Tensor) -> tuple[float, float]:
    return weight.double().sum().item(), weight.double().square().sum().item()


@pytest.fixture
def policy() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    rows = {"q_proj": HEADS * DIM, "k_proj": KV_HEADS * DIM, "v_proj": KV_HEADS * DIM}
    weights = {f"layers.0.{name}.weight": torch.randn(count, HIDDEN) for name, count in rows.items()}
    weights |= {f"layers.0.{name}.weight": torch.randn(24, HIDDEN) for name in ("gate_proj", "up_proj")}
    weights["layers.0.experts.gate_up_proj"] = torch.randn(4, 24, HIDDEN)
    return weights | {"norm.weight": torch.randn(HIDDEN), "embed.weight": torch.randn(30, HIDDEN)}


def engine(policy: dict[str, torch.Tensor], workers: int) -> list[dict[str, torch.Tensor]]:
    """As vLLM shares them: heads, rows or columns; a key's head in several workers where there are too few; norms in
    all; the vocabulary padded by zeros."""

    def share(weight, k, dim=0):
        return weight.chunk(workers, dim)[k]

    def key(name, k):
        heads = policy[f"layers.0.{name}.weight"].view(KV_HEADS, DIM, HIDDEN)
        mine = heads.chunk(workers)[k] if workers <= KV_HEADS else heads[k * KV_HEADS // workers]
        return mine.reshape(-1, HIDDEN)

    padded = torch.cat([policy["embed.weight"], torch.zeros(2, HIDDEN)])
    return [
        {
            "layers.0.qkv_proj.weight": torch.cat(
                [share(policy["layers.0.q_proj.weight"], k), key("k_proj", k), key("v_proj", k)]
            ),
            "layers.0.gate_up_proj.weight": torch.cat(
                [share(policy[f"layers.0.{name}.weight"], k) for name in ("gate_proj", "up_proj")]
            ),
            "layers.0.experts.routed_experts.w13_weight": share(policy["layers.0.experts.gate_up_proj"], k, 1),
            "norm.weight": policy["norm.weight"],
            "embed.weight": share(padded, k),
        }
        for k in range(workers)
    ]


def check(policy, workers) -> None:
    trained = {name: sums(weight) for name, weight in policy.items()}
    compare_weight_sums(trained, [{name: sums(w) for name, w in each.items()} for each in workers], PACKED)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_have_the_weights_together_and_one_change_is_seen(policy, workers, caplog):
    check(policy, engine(policy, workers))
    assert not caplog.records
    for name in engine(policy, workers)[0]:
        changed = [{each: weight.clone() for each, weight in worker.items()} for worker in engine(policy, workers)]
        changed[-1][name].view(-1)[0] += 1e-3
        with pytest.raises(RunError, match=f"the engine's weight {name} is not the policy's"):
            check(policy, changed)


def test_names_that_the_policy_does_not_have_are_told(policy, caplog):
    (worker,) = engine(policy, 1)
    check(policy, [worker | {"layers.0.in_proj.weight": torch.ones(2)}])
    assert "1 of 6 engine weights cannot be checked: layers.0.in_proj.weight" in caplog.text
    with pytest.raises(RunError, match="no weight of the engine has the name of one of the policy's"):
        check(policy, [{"x": torch.ones(2)}])
