"""The correction for the gap between engine and policy (--algo.advantage.is_correction_*): against OpenRLHF's own
PolicyLoss, and training against plain autograd."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from test_embedded import run
from test_learner import OPTIMIZER, Counted, OneRank
from tiny_models import tiny_qwen3

from openrlhf_apo import cpu
from openrlhf_apo.alpha import FixedAlpha
from openrlhf_apo.objectives import TOKEN_LOSSES, RolloutCorrection, Terms
from openrlhf_apo.ranks.micro_batch_loss import micro_batch_loss
from openrlhf_apo.trainer.anchor import AnchorSettings
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.token_objective import TokenObjective, TokenPlan
from openrlhf_apo.trainer.update import Update

GATES = [
    RolloutCorrection(level, mode, gating, low, high)
    for level, mode, gating, low, high in (
        ("token", "mask", "ratio", 0.8, 1.3),
        ("token", "clip", "ratio", 0.8, 1.3),
        ("seq", "mask", "ratio", 0.95, 1.1),
        ("token", "mask", "binary_kl", 0.0, 0.01),
        ("seq", "mask", "binary_kl", 0.0, 0.01),
        ("token", "mask", "tv", 0.0, 0.05),
        ("seq", "mask", "tv", 0.0, 0.05),
    )
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.level}-{gate.mode}-{gate.gating}")
@pytest.mark.parametrize("loss", ["grpo", "dapo", "gspo"])
def test_it_is_that_of_openrlhf(gate, loss):
    """The same sum, gradient, and share of what the gate keeps out."""
    cpu.install_for_ranks()
    from openrlhf.models.loss import PolicyLoss

    if loss == "gspo" and gate != GATES[0]:
        return  # OpenRLHF's gspo looks at none of the gate's settings
    torch.manual_seed(0)
    answers, length = 6, 9
    mask = (torch.arange(length) < torch.tensor([9, 3, 7, 1, 5, 9])[:, None]).float()
    log_probs, old = (-(torch.rand(answers, length) * 2) for _ in range(2))
    rollout = old + 0.3 * torch.randn(answers, length) * torch.linspace(0.1, 1.5, answers)[:, None]
    log_probs, old, rollout = (each * mask for each in (log_probs, old, rollout))
    advantages = torch.randn(answers, 1)
    ours = TOKEN_LOSSES[loss](eps_low=0.2, eps_high=0.2)
    weight = 1 / mask.sum() if loss == "dapo" else 1 / (answers * mask.sum(-1))
    columns = {"advantage": advantages[:, 0].double(), "weight": weight.double().expand(answers)}
    terms = Terms(columns, ours, correction=gate)

    theta = log_probs.clone().requires_grad_()
    total, measured = micro_batch_loss(terms, theta, mask, old, rollout, None, None, "k3")
    (gradient,) = torch.autograd.grad(total, theta)

    kind, bounds = "gspo" if loss == "gspo" else "ppo", [gate.low, gate.high]
    theirs = PolicyLoss(0.2, 0.2, None, loss == "dapo", kind, gate.level, gate.mode, gate.gating, bounds)
    upstream = log_probs.clone().requires_grad_()
    normalisers = {"batch_num_tokens": mask.sum(), "global_batch_size": answers}
    want, *_, filtered = theirs(upstream, old, advantages.expand_as(mask), mask, rollout, **normalisers)
    (expected,) = torch.autograd.grad(want, upstream)
    assert total.item() == pytest.approx(want.item(), abs=1e-6)
    assert torch.allclose(gradient, expected, atol=1e-6) and expected.abs().max() > 1e-3
    if loss == "gspo":
        assert "is_filtered" not in measured
        return
    counts = (measured["is_filtered"] * mask).sum(-1).tolist()
    share = gate.filtered_fraction(counts, mask.sum(-1))
    assert share == pytest.approx(filtered.item(), abs=1e-6) and 0 < share < 1


VOCABULARY, P, GROUPS = 32, 4, 6
GATE = RolloutCorrection("seq", "mask", "ratio", 0.85, 1.2)


def samples(model, seed: int) -> list[list[Sample]]:
    """Groups of graded rewards; the engine's log-probs are the policy's and a gap, which differs from answer to
    answer."""
    rng = random.Random(seed)
    groups = []
    for g in range(GROUPS):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 7))]
        groups.append([])
        for _ in range(P):
            response = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(2, 9))]
            with torch.no_grad():
                own = answer_log_probs(model, prompt, response).tolist()
            shift = rng.choice([0.0, 0.05, 0.4, -0.4])
            rollout = [log_prob + shift + rng.gauss(0, 0.1) for log_prob in own]
            reward = rng.choice([0.0, 0.25, 0.5, 1.0])
            groups[-1].append(Sample(g, f"p{g}", "", "", prompt, response, "", rollout, False, reward))
    return groups


def answer_log_probs(model, prompt: list[int], response: list[int]):
    ids = torch.tensor([prompt + response])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]


def trained(loss: str, anchor: str, limit: MicroBatchLimit, correction: RolloutCorrection | None = GATE):
    """Two rollouts of two steps, twice each -> (weights, metrics of each rollout and its `forwards`)."""
    model = tiny_qwen3(VOCABULARY)
    backend = Counted(model, OPTIMIZER, 1.0, anchor=anchor != "rollout")
    backend.calls = []
    policy = OneRank(backend, limit, entropy=False)
    if loss in TOKEN_LOSSES:
        objective = TokenObjective(policy, TokenPlan(TOKEN_LOSSES[loss](), TOKEN_LOSSES[loss].uses, 8))
    else:
        plan = GroupPlan(loss, controller=FixedAlpha(), anchor=AnchorSettings(anchor, interval=2, beta=0.5))
        objective = GroupObjective(policy, plan, VOCABULARY)
    update = Update(policy, objective, groups_per_step=GROUPS // 2, epochs=2, correction=correction)
    metrics = []
    for rollout in range(2):
        before = len(backend.calls)
        metrics.append(update.run(samples(tiny_qwen3(VOCABULARY), rollout), rollout))
        metrics[-1]["forwards"] = len(backend.calls) - before
    return flat(model), metrics


def flat(model) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def reference(loss: str, anchor: str):
    """The same by plain autograd, one answer at a time: D_α of whole groups through the kept answers alone, or GRPO's
    surrogate of the kept answers with a weight per token."""
    model, anchored = tiny_qwen3(VOCABULARY), tiny_qwen3(VOCABULARY)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.0
    )
    shares = []
    for rollout in range(2):
        groups = samples(tiny_qwen3(VOCABULARY), rollout)
        old = {}
        for sample in itertools.chain(*groups):
            with torch.no_grad():
                old[id(sample)] = answer_log_probs(model, sample.prompt_ids, sample.response_ids)
        if anchor == "rollout":
            anchored.load_state_dict(model.state_dict())
        kept = {key: None for key in old}
        for sample in itertools.chain(*groups):
            gap = (old[id(sample)] - torch.tensor(sample.rollout_log_probs)).double().mean().exp().item()
            kept[id(sample)] = GATE.low <= gap <= GATE.high
        for step in [groups[:3], groups[3:]] * 2:
            total = 0.0
            for group in step:
                total = total + (group_loss if loss == "apo" else surrogate)(model, anchored, group, old, kept)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if anchor == "ema":
                with torch.no_grad():
                    for a, b in zip(anchored.parameters(), model.parameters(), strict=True):
                        a.lerp_(b, 0.5)
            shares.append(1 - sum(kept[id(s)] for group in step for s in group) / (3 * P))
    return flat(model), shares


def group_loss(model, anchored, group, old, kept):
    """D_α of the whole group; what is masked is what flows back through an answer, and nothing of q, p or α."""
    ratios = []
    for s in group:
        now = answer_log_probs(model, s.prompt_ids, s.response_ids).double().sum()
        with torch.no_grad():
            before = answer_log_probs(anchored, s.prompt_ids, s.response_ids).double().sum()
        ratios.append((now if kept[id(s)] else now.detach()) - before)
    alpha = FixedAlpha().alpha
    log_p = (torch.stack(ratios) / 0.8).log_softmax(-1)
    rewards = torch.tensor([s.reward for s in group], dtype=torch.float64)
    z = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    q = z.softmax(-1)
    return (1 - (q**alpha * (log_p * (1 - alpha)).exp()).sum()) / (alpha * (1 - alpha)) / (GROUPS // 2)


def surrogate(model, anchored, group, old, kept):
    rewards = [s.reward for s in group]
    mean = sum(rewards) / P
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (P - 1))
    total = 0.0
    for s in group:
        a = (s.reward - mean) / (std + 1e-9) if std > 0 else 0.0
        r = (answer_log_probs(model, s.prompt_ids, s.response_ids) - old[id(s)]).exp()
        weight = (old[id(s)] - torch.tensor(s.rollout_log_probs)).exp() * kept[id(s)]
        gain = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
        total = total - (weight * gain).sum() / (len(s.response_ids) * P * (GROUPS // 2))
    return total


@pytest.mark.parametrize("loss, anchor", [("apo", "rollout"), ("apo", "ema"), ("grpo", "rollout")])
def test_masked_answers_against_plain_autograd(loss, anchor):
    want, shares = reference(loss, anchor)
    start = flat(tiny_qwen3(VOCABULARY))
    for limit in (MicroBatchLimit(tokens=10_000), MicroBatchLimit(samples=3)):
        got, metrics = trained(loss, anchor, limit)
        assert ((got - want).norm() / (want - start).norm()).item() <= 1e-3  # of what was learned
        found = [share for row in metrics for share in row["inner/is_filtered_fraction"]]
        assert found == pytest.approx(shares) and 0 < min(shares) and max(shares) < 1
        assert ("inner/is_weight_mean" in metrics[0]) == (loss == "grpo")
    assert not torch.allclose(trained(loss, anchor, MicroBatchLimit(samples=3), None)[0], want, atol=1e-5)


def test_a_masked_answer_takes_nothing_from_q_and_p():
    """Every metric of q, p and α of a first step is that without a correction; only the gradient is another."""
    limit = MicroBatchLimit(samples=3)
    (_, with_it), (_, without) = (trained("apo", "rollout", limit, gate) for gate in (GATE, None))
    for key in ("entropy_p", "entropy_q", "divergence", "loss", "alpha"):
        assert with_it[0][f"inner/{key}"][0] == without[0][f"inner/{key}"][0]
    assert with_it[0]["inner/grad_norm"][0] != without[0]["inner/grad_norm"][0]


@pytest.mark.parametrize("loss, anchor, more", [("apo", "rollout", 0), ("grpo", "rollout", 0), ("apo", "ema", 1)])
def test_it_costs_a_forward_of_later_steps_where_the_anchor_is_not_the_old_policy(loss, anchor, more):
    whole = MicroBatchLimit(tokens=10_000)
    with_it, without = (trained(loss, anchor, whole, gate)[1] for gate in (GATE, None))
    assert [a["forwards"] - b["forwards"] for a, b in zip(with_it, without, strict=True)] == [more, more]


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_an_open_gate_changes_no_group_loss(loss):
    limit = MicroBatchLimit(samples=3)
    open_gate = replace(GATE, low=0.0, high=math.inf)
    (one, metrics), (other, _) = (trained(loss, "rollout", limit, gate) for gate in (open_gate, None))
    assert torch.equal(one, other) == (loss == "apo")  # a token loss weighs what it keeps
    assert set(metrics[0]["inner/is_filtered_fraction"]) == {0.0}


@pytest.mark.parametrize("loss", ["apo", "grpo", "gspo"])
def test_flags_of_a_run_on_the_rollouts_of_another_engine(flags, training_flags, tmp_path, loss):
    """A first engine's log-probs, off by up to 0.6 nats per token."""
    run(flags, tmp_path / "first", "--data.max_samples", "16", "--apo.save_rollouts", str(tmp_path / "rollouts"))
    saved, rng = RolloutFiles(str(tmp_path / "rollouts")), random.Random(0)
    for rollout in (1, 2):
        other = saved.read(rollout)
        for sample in other:
            shift = rng.choice([0.0, 0.6])
            sample.rollout_log_probs = [log_prob - shift for log_prob in sample.rollout_log_probs]
        saved.write(rollout, other)
    gate = "--algo.advantage.is_correction_level seq --algo.advantage.is_correction_threshold".split()
    loaded = ["--loss", loss, "--apo.load_rollouts", str(tmp_path / "rollouts"), *gate[:2]]
    bounds = [*gate[2:], "0.8", "1.25"] if loss != "gspo" else []
    (corrected, plain) = (
        run(training_flags, tmp_path / name, *more)
        for name, more in (("corrected", [*loaded, *bounds]), ("plain", loaded[:4]))
    )
    assert corrected[0]["grad_norm"] != plain[0]["grad_norm"]
    assert not any(key.startswith("is_") for key in plain[0])
    assert ("is_filtered_fraction" in corrected[0]) == (loss != "gspo")
    if loss != "gspo":
        assert 0.2 < corrected[0]["is_filtered_fraction"] < 0.8
    assert ("is_weight_mean" in corrected[0]) == (loss == "grpo")
