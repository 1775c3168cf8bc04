"""Asynchronous training (--train.async_enable): a rollout is sampled while the one before trains."""

import json
import math
import signal
from dataclasses import replace
from functools import cache

import pytest
import torch
from real_runs import without_clock
from test_embedded import run
from test_exactness import GROUPS_PER_STEP, P, random_samples
from test_exactness_losses import L_MAX, LOSSES, kl_in_reward, num_tokens, z_scores
from test_learner import OPTIMIZER, Counted, OneRank
from test_rollouts import FakeEngine, groups_of, rollouts
from test_update import TablePolicy, groups, update
from tiny_models import tiny_qwen3

from openrlhf_apo.errors import RunError
from openrlhf_apo.objectives import TOKEN_LOSSES, RolloutCorrection
from openrlhf_apo.trainer.clock import Clock
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.rollouts import EngineRollouts
from openrlhf_apo.trainer.samples import whole_groups
from openrlhf_apo.trainer.stop import Stopped
from openrlhf_apo.trainer.token_objective import TokenObjective, TokenPlan
from openrlhf_apo.trainer.update import Update

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

VOCABULARY, ROLLOUTS, STEPS = 128, 2, 2
FAST = replace(OPTIMIZER, lr=5e-3)
GATE = RolloutCorrection("seq", "mask", "ratio", 0.9, 1.1)

# ---------------------------------------------------------------------------------------------------------------------
# Training against plain autograd, off-policy by one rollout.


def corrected(step):
    """GRPO's surrogate of the answers inside the gate, each token with its weight π_old / π_rollout."""
    total = 0.0
    for group in step:
        for s, a in zip(group, z_scores([s["reward"] for s in group]), strict=True):
            gap, r = s["old"] - s["rollout"], (s["new"] - s["old"]).exp()
            if GATE.low <= gap.mean().exp() <= GATE.high:
                gain = torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
                total = total - (gap.exp() * gain).sum() / (P * GROUPS_PER_STEP * len(r))
    return total


def unbiased(step):
    """ADPO with KL in the loss, whose gradient is w k1 grad log π, w = min(π / π_old, 10)."""
    kl = sum(
        ((s["new"] - s["old"]).exp().clamp(max=10) * (s["new"] - s["reference"])).detach() @ s["new"]
        for group in step
        for s in group
    )
    return LOSSES["adpo_softmax"](step) + 0.1 * kl / num_tokens(step)


CASES = {
    **{name: (name, loss, {}) for name, loss in LOSSES.items()},
    "grpo, KL in the reward": ("grpo", kl_in_reward, {"regularizer": Regularizer(kl=0.1, kl_in_reward=True)}),
    "adpo_softmax, unbiased KL": (
        *("adpo_softmax", unbiased),
        {"regularizer": Regularizer(kl=0.1, unbiased_gradient=True)},
    ),
    "grpo, correction": ("grpo", corrected, {"correction": GATE}),
}
# By the engine's log-probs, too: one of each way to use them. gtpo and the correction need weights.
BY_ENGINE = ("grpo", "gspo", "bapo", "adpo_softmax", "grpo, KL in the reward", "adpo_softmax, unbiased KL")


@cache
def rollout_of(number: int):
    """Samples whose engine is off by up to 0.2 nats per token, by another number in each answer."""
    model, samples = tiny_qwen3(VOCABULARY), random_samples(number)[: P * GROUPS_PER_STEP * STEPS]
    with torch.no_grad():
        for i, s in enumerate(samples):
            s.rollout_log_probs = (log_probs(model, s)[0] + 0.2 * math.sin(i)).tolist()
    return samples


def log_probs(model, s):
    """Of the response tokens, and the entropies there."""
    ids = torch.tensor([s.prompt_ids + s.response_ids])
    all_tokens = model(ids).logits[0, :-1].log_softmax(-1)[len(s.prompt_ids) - 1 :]
    entropies = -(all_tokens.exp() * all_tokens).sum(-1)
    return all_tokens.gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0], entropies


def flat(model) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def reference(step_loss, behavior: str, needs_reference: bool) -> torch.Tensor:
    """One sequence at a time. The policy at the start of the rollout before has sampled; the first rollout's is the
    first policy."""
    model, first, sampler = (tiny_qwen3(VOCABULARY) for _ in range(3))
    next_sampler = first.state_dict()
    settings = {"betas": FAST.betas, "eps": FAST.eps, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=FAST.lr, **settings)
    for number in range(ROLLOUTS):
        sampler.load_state_dict(next_sampler)
        next_sampler = {name: weight.clone() for name, weight in model.state_dict().items()}
        all_groups = whole_groups(rollout_of(number), P)
        for start in range(0, len(all_groups), GROUPS_PER_STEP):
            seen = []
            for group in all_groups[start : start + GROUPS_PER_STEP]:
                seen.append([])
                for s in group:
                    new, _ = log_probs(model, s)
                    rollout = torch.tensor(s.rollout_log_probs)
                    with torch.no_grad():
                        old, entropies = log_probs(sampler, s) if behavior == "anchor" else (rollout, rollout)
                        base = log_probs(first, s)[0] if needs_reference else None
                    seen[-1].append({"new": new, "old": old, "rollout": rollout, "reference": base})
                    seen[-1][-1] |= {"reward": s.reward, "entropy": entropies.mean().item(), "ids": s.response_ids}
            optimizer.zero_grad()
            step_loss(seen).backward()
            optimizer.step()
    return flat(model)


def trained(loss: str, behavior: str, limit: MicroBatchLimit, regularizer=None, correction=None):
    model = tiny_qwen3(VOCABULARY)
    backend = Counted(model, FAST, 1.0, anchor=behavior == "anchor", reference=regularizer is not None)
    backend.calls = []
    policy = OneRank(backend, limit, entropy=False, behavior=behavior)
    if loss in TOKEN_LOSSES:
        objective = TokenObjective(policy, TokenPlan(TOKEN_LOSSES[loss](), TOKEN_LOSSES[loss].uses, L_MAX), behavior)
    else:
        objective = GroupObjective(policy, GroupPlan(loss), VOCABULARY, behavior)
    parts = {"regularizer": regularizer, "correction": correction, "behavior": behavior}
    update = Update(policy, objective, groups_per_step=GROUPS_PER_STEP, epochs=1, **parts)
    metrics = [update.run(whole_groups(rollout_of(number), P), number) for number in range(ROLLOUTS)]
    return flat(model), metrics, backend.calls


@pytest.mark.parametrize(
    "case, behavior", [*((case, "anchor") for case in CASES), *((case, "engine") for case in BY_ENGINE)]
)
def test_every_objective_off_policy_by_one_rollout_against_plain_autograd(case, behavior):
    loss, step_loss, more = CASES[case]
    want = reference(step_loss, behavior, "regularizer" in more)
    learned = (want - flat(tiny_qwen3(VOCABULARY))).norm()
    off_policy, on_policy = (
        trained(loss, each, MicroBatchLimit(samples=5), **more)[0] for each in (behavior, "policy")
    )
    assert (off_policy - want).norm() <= 1e-5 * learned
    assert (on_policy - want).norm() > 1e-3 * learned


def test_it_says_how_far_the_policy_is_from_what_sampled():
    _, rows, _ = trained("grpo", "anchor", MicroBatchLimit(samples=5))
    assert [row["staleness"] for row in rows] == [0, STEPS]
    assert rows[0]["staleness_kl"] == 0.0 < 1e-6 < rows[1]["staleness_kl"]
    _, group_rows, _ = trained("adpo_softmax", "anchor", MicroBatchLimit(samples=5))
    assert group_rows[0]["inner/log_ratio_std"][0] == 0.0 < group_rows[1]["inner/log_ratio_std"][0]
    # The engine is 0.2 sin(i) off the first policy, which sampled the first two rollouts.
    off = sum(abs(0.2 * math.sin(i)) * len(s.response_ids) for i, s in enumerate(rollout_of(1)[: P * GROUPS_PER_STEP]))
    tokens = sum(len(s.response_ids) for s in rollout_of(1)[: P * GROUPS_PER_STEP])
    assert rows[1]["rollout_mismatch"] == group_rows[1]["rollout_mismatch"] == pytest.approx(off / tokens, rel=1e-4)
    _, engine_rows, _ = trained("grpo", "engine", MicroBatchLimit(samples=5))
    assert all("rollout_mismatch" not in row and row["staleness_kl"] > 1e-3 for row in engine_rows)


@pytest.mark.parametrize("loss", ["grpo", "adpo_softmax"])
def test_it_costs_a_forward_of_each_step_or_none(loss):
    whole = MicroBatchLimit(tokens=10_000)
    trains = ROLLOUTS * STEPS
    _, _, calls = trained(loss, "anchor", whole)
    assert calls.count(("policy", True)) == calls.count(("anchor", False)) == trains == len(calls) / 2
    assert trained(loss, "engine", whole)[2] == [("policy", True)] * trains


def test_a_rollout_without_groups_moves_on_which_policy_sampled():
    policy = TablePolicy()
    trainer = update(policy)
    trainer.behavior = "anchor"
    trainer.run(groups(), 0)
    assert not torch.equal(policy.anchor, policy.logits) and trainer.staleness == 2
    assert trainer.run([], 1) == {}
    assert torch.equal(policy.anchor, policy.logits) and trainer.staleness == 0


# ---------------------------------------------------------------------------------------------------------------------
# How a rollout is made.


class Recording(FakeEngine):
    """own_weights: as an engine of the cluster, which samples when it is waited for."""

    def __init__(self, own_weights: bool):
        self.own_weights, self.calls = own_weights, []

    def begin(self, prompts, settings, prefix=None):
        self.calls.append(f"begin {prompts[0].group_id}")
        return super().begin(prompts, settings, prefix)


def recorded(own_weights: bool, **settings):
    source = rollouts(**settings)
    source.engine = Recording(own_weights)
    return source


def test_what_is_begun_is_finished_with_the_same_weights():
    filtered = {"period": 3, "max_generations": 10}
    for own_weights, before_training in ((True, ["begin 0"]), (False, ["begin 0", "begin 4", "begin 8"])):
        source = recorded(own_weights, keep=lambda group: group[0].group_id % 3 == 0, **filtered)
        source.begin(1, Clock())
        assert source.engine.calls == before_training
        source.finish(1, Clock())
        assert source.engine.calls == ["begin 0", "begin 4", "begin 8"]
        source.finish(1, Clock())  # nothing is under way
        straight = recorded(own_weights, keep=source.keep, **filtered)
        assert groups_of(source, 1) == groups_of(straight, 1) and source.metrics == straight.metrics
        assert source.engine.calls == straight.engine.calls


def test_a_rollout_that_is_ready_is_part_of_the_state():
    straight, resumed = (recorded(True, generate_batch=9) for _ in range(2))
    straight.sample(1, Clock())
    straight.begin(2, Clock())
    straight.finish(2, Clock())
    state = json.loads(json.dumps([straight.prompts.state_dict(), straight.state_dict()]))
    resumed.prompts.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for rollout in (2, 3, 4):
        assert not resumed.exhausted
        assert resumed.sample(rollout, Clock()) == straight.sample(rollout, Clock())
        assert resumed.metrics == straight.metrics


def test_the_last_rollout_is_not_lost_where_it_has_used_up_the_prompts():
    source = recorded(True, generate_batch=10)
    for rollout in range(1, 7):
        assert not source.exhausted
        source.sample(rollout, Clock())
        if rollout < 6:
            source.begin(rollout + 1, Clock())
            source.finish(rollout + 1, Clock())
    assert source.exhausted


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs, embedded: the order is that of a cluster.

ASYNC = ["--train.async_enable", "--data.max_samples", "32"]


@pytest.mark.parametrize("loss", ["apo", "gtpo", "dapo"])
@pytest.mark.parametrize("lora", [[], ["--ds.lora.rank", "4", "--actor.adam.lr", "3e-2"]])
def test_the_policy_that_sampled_is_the_one_that_is_kept(flags, tmp_path, loss, lora):
    """The engine's log-probs are those of the weights that it is compared with, though the policy has left them."""
    rows = run(flags, tmp_path, "--loss", loss, *ASYNC, *lora)
    assert [row["staleness"] for row in rows] == [0, 2, 2, 2]
    assert all(row["rollout_mismatch"] < 1e-5 for row in rows)
    assert rows[0]["staleness_kl"] < 1e-9 and all(row["staleness_kl"] > 1e-6 for row in rows[1:])


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_by_the_engines_own_log_probs_it_is_the_same_run_to_a_rounding(flags, tmp_path, loss):
    rows = run(flags, tmp_path / "weights", "--loss", loss, *ASYNC)
    engine = run(flags, tmp_path / "engine", "--loss", loss, *ASYNC, "--apo.old_log_probs", "engine")
    for one, other in zip(rows, engine, strict=True):
        assert "rollout_mismatch" not in other
        for key in ("reward_mean", "staleness"):
            assert one[key] == other[key]
        for key in ("staleness_kl", "log_ratio_std", "grad_norm", "loss"):
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("anchor", ["lagged", "ema", "reference"])
def test_other_anchors_stay_what_they_are(flags, tmp_path, anchor):
    rows = run(flags, tmp_path, "--apo.anchor", anchor, *ASYNC)
    assert all("rollout_mismatch" not in row for row in rows) and rows[1]["staleness_kl"] > 1e-6
    moved = [row["inner/log_ratio_std"][0] > 0 for row in rows]
    # ema follows the policy's last step; the lagged anchor is the policy at the start of rollout 1, of four.
    assert moved == [False, True, True, True]


def test_saved_rollouts_of_an_asynchronous_run_train_the_same_model(flags, training_flags, tmp_path):
    saved = RolloutFiles(str(tmp_path / "rollouts"))
    rows = run(flags, tmp_path / "first", "--loss", "grpo", *ASYNC, "--apo.save_rollouts", str(saved.directory))
    again = ["--apo.load_rollouts", str(saved.directory), "--train.async_enable"]
    replayed = run(training_flags, tmp_path / "again", "--loss", "grpo", *again)
    keys = ("grad_norm", "staleness", "staleness_kl", "inner/ppo_kl", "rollout_mismatch")
    assert [[row[key] for key in keys] for row in replayed] == [[row[key] for key in keys] for row in rows]


def test_asked_to_end_while_the_next_rollout_is_begun_it_goes_on_as_if_nothing_had_been(flags, tmp_path, monkeypatch):
    straight = run(flags, tmp_path / "straight", "--loss", "grpo", *ASYNC)
    begin = EngineRollouts.begin

    def stopped(self, rollout, clock):
        begin(self, rollout, clock)
        if rollout == 3:
            raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EngineRollouts, "begin", stopped)
        with pytest.raises(Stopped):
            run(flags, tmp_path / "resumed", "--loss", "grpo", *ASYNC)
    resumed = run(flags, tmp_path / "resumed", "--loss", "grpo", *ASYNC, "--ckpt.load_enable")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    assert without_clock(resumed) == without_clock(straight)


def test_a_rollout_that_was_sampled_ahead_is_not_trained_on_as_if_it_were_of_now(flags, tmp_path, monkeypatch):
    begin = EngineRollouts.begin

    def stopped(self, rollout, clock):
        if rollout == 3:
            raise Stopped(signal.SIGTERM)
        begin(self, rollout, clock)

    with monkeypatch.context() as patch:
        patch.setattr(EngineRollouts, "begin", stopped)
        with pytest.raises(Stopped):
            run(flags, tmp_path, "--loss", "grpo", *ASYNC)
    synchronous = ["--ckpt.load_enable", "--ckpt.allow_changed", "train.async_enable", *ASYNC[1:]]
    with pytest.raises(RunError, match="resume it with --train.async_enable"):
        run(flags, tmp_path, "--loss", "grpo", *synchronous)


def test_without_it_there_is_no_staleness(flags, tmp_path):
    rows = run(flags, tmp_path, "--data.max_samples", "16")
    assert not any(key.startswith("staleness") for row in rows for key in row)
