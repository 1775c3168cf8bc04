"""The same promise for every other objective and regulariser: steps of the embedded runtime and of DeepSpeed's ranks
against plain autograd through one sequence at a time, with each objective written out from its formula."""

import math
import random

import pytest
import torch
from test_exactness import (
    ADAM,
    GROUPS,
    GROUPS_PER_STEP,
    TAU,
    P,
    model_path,  # noqa: F401
    random_samples,
    rollouts,  # noqa: F401
    spmd,
)

from openrlhf_apo.trainer.rollout_files import RolloutFiles

L_MAX, N = 20, P * GROUPS_PER_STEP
REGULARIZED = ("grpo", "gspo", "adpo_softmax")


def z_scores(rewards):
    centred = [r - sum(rewards) / P for r in rewards]
    std = math.sqrt(sum(c * c for c in centred) / (P - 1))
    return [c / (std + 1e-9) if std > 0 else 0.0 for c in centred]


def per_answer(step, advantage, term, normaliser):
    """Σ_i Σ_t term(ratio, log_prob, A_i) / normaliser(|y_i|) over the step's [{new, old, ...}]."""
    total = 0.0
    for group in step:
        for s, a in zip(group, advantage([s["reward"] for s in group]), strict=True):
            total = total + term((s["new"] - s["old"]).exp(), s["new"], a).sum() / normaliser(len(s["new"]))
    return total


def clipped(low, high, dual=None):
    def term(r, _, a):
        gain = torch.minimum(r * a, r.clamp(low, high) * a)
        return -(torch.maximum(gain, torch.full_like(gain, dual * a)) if dual and a < 0 else gain)

    return term


def num_tokens(step):
    return sum(len(s["new"]) for group in step for s in group)


def grpo(step):
    return per_answer(step, z_scores, clipped(0.8, 1.2), lambda n: N * n)


def dr_grpo(step):
    return per_answer(step, lambda r: [x - sum(r) / P for x in r], clipped(0.8, 1.2), lambda n: N * L_MAX)


def dapo(step):
    return per_answer(step, z_scores, clipped(0.8, 1.28), lambda n: num_tokens(step))


def cispo(step):
    return per_answer(
        step, z_scores, lambda r, logp, a: -r.detach().clamp(0, 5) * a * logp, lambda n: num_tokens(step)
    )


def gspo(step):
    total = 0.0
    for group in step:
        for s, a in zip(group, z_scores([s["reward"] for s in group]), strict=True):
            ratio = (s["new"] - s["old"]).mean().exp()
            total = total - torch.minimum(ratio * a, ratio.clamp(1 - 3e-4, 1 + 4e-4) * a) / N
    return total


def alpha_ppo(step):
    def term(r, _, a):
        return (1 - r**0.5 + 0.5 * (r - 1)) / 0.25 - r * a

    return per_answer(step, z_scores, term, lambda n: num_tokens(step))


def bapo(step):
    ratios, signs = [], []
    for group in step:
        for s, a in zip(group, z_scores([s["reward"] for s in group]), strict=True):
            ratios.append((s["new"] - s["old"]).detach().exp())
            signs.append(torch.full_like(ratios[-1], a))
    r, a = torch.cat(ratios), torch.cat(signs)
    bounds = [(0.6, 1.2), *((0.6 + 0.05 * k, 1.2) for k in range(1, 7))]
    bounds += [(0.9, 1.2 + 0.05 * k) for k in range(1, 37)]
    for low, high in bounds:
        good, bad = (r.clamp(max=high) * a.clamp(min=0)).sum(), (r.clamp(min=low) * (-a).clamp(min=0)).sum()
        if good >= 0.5 * (good + bad):
            break
    return per_answer(step, z_scores, clipped(low, high, 3.0), lambda n: num_tokens(step))


def gtpo(step):
    """Conflicts are looked for position by position, from the start and from the end."""
    total = 0.0
    for group in step:
        z = z_scores([s["reward"] for s in group])
        for i, s in enumerate(group):
            rivals = [other["ids"] for other, a in zip(group, z, strict=True) if a * z[i] < 0]
            ids, weights = s["ids"], [1.0] * len(s["ids"])
            for backwards in (False, True):
                for t in range(len(ids)):
                    t = -1 - t if backwards else t
                    if not any(-len(o) <= t < len(o) and o[t] == ids[t] for o in rivals):
                        break
                    weights[t] = 2.0 if z[i] > 0 else 0.0
            a = z[i] - 0.1 * s["entropy"]  # H_ini > ln 2: no answer is left out
            total = total - (torch.tensor(weights) * (s["new"] - s["old"]).exp() * a).sum() / (N * len(ids))
    return total


def of_groups(loss):
    def step_loss(step):
        total = 0.0
        for group in step:
            u = torch.stack([(s["new"] - s["old"]).double().sum() for s in group]) / TAU
            total = total + loss(u, [s["reward"] for s in group]) / GROUPS_PER_STEP
        return total

    return step_loss


def softmax(u, rewards):
    r = torch.tensor(rewards, dtype=torch.float64)
    return -(((r - r.mean()) / (r.std(correction=0) + 1e-6)).softmax(0) * u.log_softmax(0)).sum()


def pairwise(u, rewards):
    pairs = [(i, j) for i in range(P) for j in range(P) if rewards[i] > rewards[j]]
    return sum((1 + (u[j] - u[i]).exp()).log() for i, j in pairs) / max(1, len(pairs)) + 0 * u.sum()


def plackett_luce(u, rewards):
    total = 0.0
    for i in range(P):
        worse = [u[j] for j in range(P) if rewards[j] < rewards[i]]
        total = total + torch.stack([u[i], *worse]).logsumexp(0) - u[i]
    return total / P


LOSSES = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "gtpo": gtpo,
    "bapo": bapo,
    "alpha_ppo": alpha_ppo,
    "adpo_softmax": of_groups(softmax),
    "adpo_pairwise": of_groups(pairwise),
    "adpo_plackett_luce": of_groups(plackett_luce),
}


def regularised(name, kind):
    """tests/spmd.py's REGULARIZERS, written out. KL is inside the answer's mean where the loss is one."""

    def k3(s):
        d = s["reference"] - s["new"]
        return d.exp() - 1 - d

    def step_loss(step):
        tokens, samples = num_tokens(step), [s for group in step for s in group]
        share = [1 / tokens if name == "adpo_softmax" else 1 / (N * len(s["new"])) for s in samples]
        if kind == "kl":
            betas = [0.1] * N
            entropy = sum(0.01 * s["entropies"].sum() for s in samples) / tokens
        else:
            betas = [min(max(0.1 - a, -0.5), 1.0) for group in step for a in z_scores([s["reward"] for s in group])]
            entropy = 0.0
        kl = sum(w * b * k3(s).sum() for w, b, s in zip(share, betas, samples, strict=True))
        return LOSSES[name](step) + kl - entropy

    return step_loss


def kl_in_reward(step):
    """GRPO with A_it = A_i − 0.1 Σ_{s ≥ t} k3(π_old ‖ π_ref)."""
    total = 0.0
    for group in step:
        for s, a in zip(group, z_scores([s["reward"] for s in group]), strict=True):
            d = s["reference"] - s["old"]
            kl = d.exp() - 1 - d
            a = a - 0.1 * torch.stack([kl[t:].sum() for t in range(len(kl))])
            r = (s["new"] - s["old"]).exp()
            total = total - torch.minimum(r * a, r.clamp(0.8, 1.2) * a).sum() / (N * len(kl))
    return total


CASES = {(name, None): loss for name, loss in LOSSES.items()}
CASES |= {(name, kind): regularised(name, kind) for name in REGULARIZED for kind in ("kl", "adrpo")}
CASES[("grpo", "kl_reward")] = kl_in_reward
SHARDED = (("gspo", "adrpo"), ("grpo", "kl_reward"), ("gtpo", None))


def reference(model_path: str, rollouts: str, step_loss) -> dict:  # noqa: F811
    """Four AdamW steps on one rollout."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, **ADAM)

    def places(s) -> list[int]:
        return [t for t in range(len(s.response_ids)) if s.own is None or s.own[t]]

    def run(s) -> tuple:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)[len(s.prompt_ids) - 1 :]
        entropies = -(log_probs.exp() * log_probs).sum(-1)
        picked = log_probs.gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0]
        return picked[places(s)], entropies[places(s)]

    samples = RolloutFiles(rollouts).read(1)
    groups = [samples[k : k + P] for k in range(0, len(samples), P)]
    steps = [groups[k : k + GROUPS_PER_STEP] for k in range(0, GROUPS, GROUPS_PER_STEP)]
    with torch.no_grad():
        start = {id(s): run(s) for s in samples}
    gradients = []
    for step in steps:
        seen = []
        for group in step:
            seen.append([])
            for s in group:
                new, entropies = run(s)
                old, old_entropies = start[id(s)]
                seen[-1].append(
                    {"new": new, "old": old, "reference": old, "entropies": entropies, "reward": s.reward}
                    | {"entropy": old_entropies.mean().item(), "ids": [s.response_ids[t] for t in places(s)]}
                )
        optimizer.zero_grad()
        step_loss(seen).backward()
        gradients.append(torch.cat([w.grad.flatten().clone() for w in model.parameters()]))
        optimizer.step()
    return {"gradients": gradients, "weights": torch.cat([w.detach().flatten() for w in model.parameters()])}


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_path, rollouts) -> dict:  # noqa: F811
    """{case: gradients and weights of (embedded, one micro-batch), (two ranks, ZeRO 2, of 5)}, and of some cases also
    (two ranks, ZeRO 3, of 5): gloo hangs at the ninth ZeRO-3 engine of a process."""
    found = {}
    whole, five = {"tokens": 4096}, {"samples": 5}
    for ranks, parts in ((1, [("embedded", whole, CASES)]), (2, [(2, five, CASES), (3, five, SHARDED)])):
        chosen = [(case, stage, limit) for stage, limit, cases in parts for case in cases]
        cases = [(stage, limit, {"loss": loss, "regularizer": kind}) for (loss, kind), stage, limit in chosen]
        results = spmd(tmp_path_factory.mktemp("ranks"), model_path, rollouts, ranks, cases)
        for (case, *_), result in zip(chosen, results, strict=True):
            found.setdefault(case, []).append(result)
    return found


CONVERSATIONS = (("adpo_softmax", "kl"), ("gtpo", None), ("bapo", None), ("grpo", "kl_reward"))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> str:
    """The same samples, a third of whose response tokens an environment has said; each has one of the policy's."""
    path, rng = tmp_path_factory.mktemp("conversations"), random.Random(7)
    samples = random_samples(1)
    for sample in samples:
        own = [rng.random() < 2 / 3 for _ in sample.response_ids]
        own[0] = own[0] or not any(own)
        sample.own = None if all(own) else own
        sample.rollout_log_probs = [-1.0 * mine for mine in own]
    assert sum(sample.own is not None for sample in samples) > len(samples) / 2
    RolloutFiles(str(path)).write(1, samples)
    return str(path)


def test_feedback_is_read_and_not_trained(tmp_path, model_path, conversations):  # noqa: F811
    want = [reference(model_path, conversations, CASES[case]) for case in CONVERSATIONS]
    cases = [("embedded", {"tokens": 4096}), ("embedded", {"samples": 3}), (2, {"samples": 5})]
    for ranks, stages in ((1, cases[:2]), (2, cases[2:])):
        jobs = [
            (stage, limit, {"loss": loss, "regularizer": kind})
            for stage, limit in stages
            for loss, kind in CONVERSATIONS
        ]
        found = spmd(tmp_path, model_path, conversations, ranks, jobs)
        for job, got, expected in zip(jobs, found, want * len(stages), strict=True):
            for a, b in zip(got["gradients"], expected["gradients"], strict=True):
                assert distance(a, b) <= 1e-5, job
            assert distance(got["weights"], expected["weights"]) <= 1e-5, job


def distance(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_every_objective_takes_the_reference_step(results, model_path, rollouts, case):  # noqa: F811
    want = reference(model_path, rollouts, CASES[case])
    for got in results[case]:
        for a, b in zip(got["gradients"], want["gradients"], strict=True):
            assert distance(a, b) <= 1e-5
        assert distance(got["weights"], want["weights"]) <= 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, case)))
def test_layouts_agree_to_a_rounding(results, case):
    one, *others = results[case]
    for other in others:
        assert distance(other["gradients"][0], one["gradients"][0]) <= 1e-6  # later steps carry rounding on
