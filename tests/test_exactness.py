"""The promise of the project: an optimizer step does not depend on micro-batching, accumulation, sharding or ranks.

Every case is compared with a reference that knows none of them: Algorithm 1 in one process, with ordinary autograd
through whole groups. P = 8, fp32, four optimizer steps on one rollout; Adam's eps is raised to 1e-2 so that its
sign-like update does not amplify rounding, and the learning rate moves weights by more than 1e-3.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import run_ranks

from openrlhf_apo.errors import GroupError
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample, whole_groups

P, GROUPS, GROUPS_PER_STEP = 8, 16, 4
TAU, BETA, ALPHA_MAX, ALPHA_MIN, RHO, LAM = 0.8, 1.0, 0.9, 0.35, 0.1, 0.1
ADAM = {"betas": (0.0, 0.95), "eps": 1e-2, "weight_decay": 0.0}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return str(path)


def random_samples(seed: int) -> list[Sample]:
    """Groups of graded rewards and uneven lengths, one group of equal rewards among them."""
    rng = random.Random(seed)
    samples = []
    for group in range(GROUPS):
        prompt = [rng.randrange(2, 128) for _ in range(rng.randrange(2, 9))]
        for _ in range(P):
            response = [rng.randrange(2, 128) for _ in range(rng.randrange(1, 20))]
            reward = 1.0 if group == 3 else rng.choice([0.0, 0.25, 0.5, 1.0])
            samples.append(
                Sample(group, f"p{group}", "", "t", prompt, response, "", [-1.0] * len(response), False, reward)
            )
    return samples


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rollouts")
    for step in (1, 2, 3):
        RolloutFiles(str(path)).write(step, random_samples(step))
    return str(path)


def reference(
    model_path: str,
    rollouts: str,
    *,
    num_rollouts=1,
    anchor="rollout",
    epochs=1,
    lr=5e-3,
    lora=0,
    behavior="policy",
) -> dict:
    """Algorithm 1 of arXiv 2512.22953 with several updates per rollout, in one process and plain torch. lora: the
    rank of peft's adapter; the anchor is a whole second model all the same. behavior: with "anchor" the policy at the
    start of the rollout before has sampled, as asynchronous training has it."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

    def load():
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        torch.manual_seed(0)
        settings = {"r": lora, "lora_alpha": 16, "target_modules": "all-linear"}
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)) if lora else model

    def trained(model):
        return [weight for weight in model.parameters() if weight.requires_grad]

    model, anchor_model = load(), load()
    optimizer = torch.optim.AdamW(trained(model), lr=lr, **ADAM)

    def log_prob_sums(net, group):  # -> ℓ[P]
        sums = []
        for s in group:  # one sequence at a time: no padding either
            ids = torch.tensor([s.prompt_ids + s.response_ids])
            log_probs = net(ids).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(-1, ids[0, 1:, None])[:, 0]
            sums.append(picked[len(s.prompt_ids) - 1 :].double().sum())
        return torch.stack(sums)

    alpha, baseline, scale = ALPHA_MAX, None, 0.5
    gradients, alphas = [], []
    sampling = load().state_dict()
    for rollout in range(num_rollouts):
        samples = RolloutFiles(rollouts).read(rollout + 1)
        groups = [samples[k : k + P] for k in range(0, len(samples), P)]
        steps = [groups[k : k + GROUPS_PER_STEP] for k in range(0, GROUPS, GROUPS_PER_STEP)]
        current = {name: weight.clone() for name, weight in model.state_dict().items()}
        if behavior == "anchor":
            anchor_model.load_state_dict(sampling)
        elif anchor == "rollout" or (anchor == "lagged" and rollout % 2 == 0):
            anchor_model.load_state_dict(current)
        sampling = current  # of the next rollout
        for update in range(epochs * len(steps)):
            step = steps[update % len(steps)]
            u = []
            for group in step:
                with torch.no_grad():
                    start = log_prob_sums(anchor_model, group)
                u.append((log_prob_sums(model, group) - start) / TAU)
            log_p = torch.stack(u).log_softmax(-1)
            rewards = torch.tensor([[s.reward for s in group] for group in step], dtype=torch.float64)
            z = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True, correction=0) + 1e-6)
            q = (z / BETA).softmax(-1)

            p = log_p.detach().exp()
            confidence = 1 - (-(p * p.log()).sum(-1) / math.log(P)).mean().item()
            r = rewards.mean().item()
            baseline = r if baseline is None else baseline
            improvement = max(0.0, math.tanh((r - baseline) / scale))
            scale = math.sqrt((1 - LAM) * (scale**2 + LAM * (r - baseline) ** 2))
            baseline = (1 - LAM) * baseline + LAM * r
            target = ALPHA_MAX - (ALPHA_MAX - ALPHA_MIN) * confidence * improvement
            alpha = (1 - RHO) * alpha + RHO * target
            alphas.append(alpha)

            divergence = (1 - (q**alpha * (log_p * (1 - alpha)).exp()).sum(-1)) / (alpha * (1 - alpha))
            optimizer.zero_grad()
            divergence.mean().backward()
            gradients.append(torch.cat([w.grad.flatten().clone() for w in trained(model)]))
            optimizer.step()
            if anchor == "ema":
                with torch.no_grad():
                    for old, new in zip(anchor_model.parameters(), model.parameters(), strict=True):
                        old.lerp_(new, 0.5)
    weights = torch.cat([w.detach().flatten() for w in trained(model)])
    start = torch.cat([w.detach().flatten() for w in trained(load())])
    return {"gradients": gradients, "weights": weights, "start": start, "alphas": alphas}


def spmd(tmp_path: Path, model_path: str, rollouts: str, ranks: int, cases, **job) -> list[dict]:
    """Run tests/spmd.py on `ranks` processes; one result per case (ZeRO stage or "embedded", micro-batches, other
    settings)."""
    job = {
        "model": model_path,
        "samples": rollouts,
        "group_size": P,
        "step_size": P * GROUPS_PER_STEP,
        "loss": "apo",
        "regularizer": None,
        "anchor": "rollout",
        "behavior": "policy",
        "epochs": 1,
        "num_rollouts": 1,
        "lr": 5e-3,
        "lora": 0,
    } | job
    job["cases"] = [
        {"zero_stage": stage, "limit": limit, "out": str(tmp_path / f"{ranks}_{k}.pt")} | other
        for k, (stage, limit, other) in enumerate(cases)
    ]
    path = tmp_path / f"job_{ranks}.json"
    path.write_text(json.dumps(job))
    run_ranks([str(Path(__file__).with_name("spmd.py")), str(path)], ranks, tmp_path)
    return [torch.load(case["out"], weights_only=True) for case in job["cases"]]


def assert_same(result: dict, expected: dict, case: str = "") -> None:
    assert len(result["gradients"]) == len(expected["gradients"])
    for step, (got, want) in enumerate(zip(result["gradients"], expected["gradients"], strict=True)):
        error = ((got - want).norm() / want.norm()).item()
        assert error <= 1e-5, f"{case} gradient of step {step}: {error:.1e}"
    error = ((result["weights"] - expected["weights"]).norm() / expected["weights"].norm()).item()
    assert error <= 1e-5, f"{case} final weights: {error:.1e}"
    alphas = [alpha for metrics in result["metrics"] for alpha in metrics["inner/alpha"]]
    assert alphas == pytest.approx(expected["alphas"], abs=1e-7)


@pytest.fixture(scope="module")
def expected(model_path, rollouts) -> dict:
    result = reference(model_path, rollouts)
    moved = (result["weights"] - result["start"]).abs().max().item()
    assert moved >= 1e-3, "the learning rate must move weights, or equality proves nothing"
    return result


SIZES = [*({"samples": size} for size in (1, 2, 3, 8)), {"tokens": 40}]
SOME = [{"samples": 3}, {"tokens": 40}]
LAYOUTS = {
    1: [("embedded", limit) for limit in SIZES] + [(0, {"samples": 1})] + [(2, limit) for limit in SOME],
    2: [(2, {"samples": 1})] + [(stage, limit) for stage in (2, 3) for limit in SOME],
}


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_every_layout_takes_the_reference_step(tmp_path, model_path, rollouts, expected, ranks):
    cases = [(stage, limit, {}) for stage, limit in LAYOUTS[ranks]]
    for (stage, limit, _), result in zip(cases, spmd(tmp_path, model_path, rollouts, ranks, cases), strict=True):
        assert_same(result, expected, f"{stage}, micro-batches of {limit}")


# Twelve steps: a smaller rate, because rounding grows from step to step with it.
ANCHORS = [
    *({"anchor": anchor, "num_rollouts": 3, "lr": 1e-3} for anchor in ("lagged", "ema", "reference")),
    {"behavior": "anchor", "num_rollouts": 3, "lr": 1e-3},  # asynchronous
]
LONGER = [*ANCHORS, {"epochs": 2, "lr": 1e-3}]


@pytest.fixture(scope="module")
def expected_longer(model_path, rollouts) -> list[dict]:
    return [reference(model_path, rollouts, **settings) for settings in LONGER]


@pytest.mark.parametrize("ranks, stage", [(1, "embedded"), (1, 2), (2, 3)])
def test_anchors_over_three_rollouts_and_several_epochs_on_one(
    tmp_path, model_path, rollouts, expected_longer, ranks, stage
):
    cases = [(stage, {"samples": 11}, settings) for settings in LONGER]
    results = spmd(tmp_path, model_path, rollouts, ranks, cases)
    for settings, got, want in zip(LONGER, results, expected_longer, strict=True):
        assert_same(got, want, str(settings))


# Adapters move the model less than all of its weights do.
ADAPTERS = [settings | {"lora": 4, "lr": 5e-3} for settings in ANCHORS]


@pytest.fixture(scope="module")
def expected_of_adapters(model_path, rollouts) -> list[dict]:
    results = [reference(model_path, rollouts, **settings) for settings in ADAPTERS]
    assert all((result["weights"] - result["start"]).abs().max() >= 1e-3 for result in results)
    return results


@pytest.mark.parametrize("ranks, stages", [(1, ["embedded"]), (2, [2, 3])])
def test_an_adapter_that_is_its_own_anchor_takes_the_steps_of_two_whole_models(
    tmp_path, model_path, rollouts, expected_of_adapters, ranks, stages
):
    cases = [(stage, {"samples": 11}, settings) for stage in stages for settings in ADAPTERS]
    results = spmd(tmp_path, model_path, rollouts, ranks, cases)
    for case, got, want in zip(cases, results, expected_of_adapters * len(stages), strict=True):
        assert_same(got, want, str(case))


def test_partial_and_mixed_groups_are_refused_by_name():
    samples = random_samples(0)
    with pytest.raises(GroupError, match=r"7 of 8 samples \(prompt 'p0'\)"):
        whole_groups(samples[1:], P)
    samples[0].prompt = "p1"
    with pytest.raises(GroupError, match="mixes prompts 'p1' and 'p0'"):
        whole_groups(samples, P)
