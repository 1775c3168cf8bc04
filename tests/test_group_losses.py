"""Group objectives against their formulas, looped over answers one at a time in float64; and the registry."""

import math
import random
import statistics

import pytest
import torch

from openrlhf_apo.errors import LossError
from openrlhf_apo.objectives import (
    GROUP_LOSSES,
    AlphaDivergenceLoss,
    GroupContext,
    GroupTargetBuilder,
    group_loss,
)
from openrlhf_apo.objectives.group_base import coefficients
from openrlhf_apo.options.own_file import load_own_file

TAU, BETA_R = 0.8, 0.7
ADPO = ["adpo_softmax", "adpo_pairwise", "adpo_plackett_luce"]
BUILT_IN = ["apo", *ADPO]


def case(kind: str, groups: int = 4, size: int = 6, seed: int = 0):
    """log_ratio[G, P], rewards[G, P], context."""
    rng = random.Random(f"{kind}{seed}")
    reward = {"equal": lambda: 0.1, "binary": lambda: float(rng.random() < 0.5)}.get(kind, lambda: rng.gauss(0, 1))
    scale = {"on_policy": 0.0, "extreme": 40.0}.get(kind, 1.0)
    rewards = torch.tensor([[reward() for _ in range(size)] for _ in range(groups)], dtype=torch.float64)
    pull = (lambda: rng.choice([0.0, 20.5 * TAU])) if kind == "steep" else lambda: rng.gauss(0, scale)
    log_ratio = torch.tensor([[pull() for _ in range(size)] for _ in range(groups)], dtype=torch.float64)
    return log_ratio, rewards, context_of(rewards)


def context_of(rewards, alpha=1.0):
    return GroupContext(GroupTargetBuilder(beta_r=BETA_R)(rewards), torch.ones_like(rewards), alpha, TAU)


# ---------------------------------------------------------------------------------------------------------------------
# The oracles: one group of scalars u_i = log_ratio_i / tau and rewards R_i.


def log_sum_exp(values):
    top = max(v.item() for v in values)
    return top + torch.log(sum(torch.exp(v - top) for v in values))


def adpo_softmax(u, rewards):
    deviation = statistics.pstdev(rewards) + 1e-6
    weights = [math.exp((r - statistics.mean(rewards)) / deviation / BETA_R) for r in rewards]
    return -sum(w / math.fsum(weights) * (x - log_sum_exp(u)) for w, x in zip(weights, u, strict=True))


def adpo_pairwise(u, rewards):
    losses = []
    for x, r in zip(u, rewards, strict=True):
        for y, s in zip(u, rewards, strict=True):
            if r > s:
                losses.append(log_sum_exp([torch.zeros_like(x), y - x]))  # -log sigmoid(x - y)
    return sum(losses) / len(losses) if losses else 0.0 * sum(u)


def adpo_plackett_luce(u, rewards):
    total = 0.0
    for i, x in enumerate(u):
        total = total + log_sum_exp([x] + [y for y, r in zip(u, rewards, strict=True) if r < rewards[i]]) - x
    return total / len(u)


ORACLES = {f.__name__: f for f in (adpo_softmax, adpo_pairwise, adpo_plackett_luce)}


def oracle(name, log_ratio, rewards):
    values, gradients = [], []
    for row, r in zip(log_ratio.tolist(), rewards.tolist(), strict=True):
        leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in row]
        value = ORACLES[name]([x / TAU for x in leaves], r)
        values.append(value.item())
        gradients.append([g.item() for g in torch.autograd.grad(value, leaves)])
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


KINDS = ["random", "binary", "equal", "on_policy", "steep", "extreme"]


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADPO)
def test_value_and_coefficients_are_the_formula_s(name, kind, size):
    for seed in range(3):
        log_ratio, rewards, context = case(kind, size=size, seed=seed)
        loss, c = coefficients(name, log_ratio, rewards, context)
        expected, gradient = oracle(name, log_ratio, rewards)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(c, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["random", "binary"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_coefficients_are_finite_differences_of_the_value(name, kind):
    log_ratio, rewards, _ = case(kind)
    context = context_of(rewards, alpha=0.6)
    _, c = coefficients(name, log_ratio, rewards, context)
    h = 1e-5
    for i in range(log_ratio.shape[1]):
        step = h * torch.eye(log_ratio.shape[1], dtype=torch.float64)[i]
        up, down = (coefficients(name, log_ratio + s, rewards, context)[0] for s in (step, -step))
        torch.testing.assert_close(c[:, i], (up - down) / (2 * h), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_coefficients_of_a_group_sum_to_zero(name, kind):
    log_ratio, rewards, context = case(kind)
    _, c = coefficients(name, log_ratio, rewards, context)
    assert c.sum(-1).abs().max() < 1e-14
    shifted, _ = coefficients(name, log_ratio + 3.0, rewards, context)
    torch.testing.assert_close(shifted, coefficients(name, log_ratio, rewards, context)[0], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Limits and ties.


@pytest.mark.parametrize("kind", ["random", "binary", "equal", "on_policy"])
def test_softmax_is_apo_as_alpha_goes_to_one(kind):
    log_ratio, rewards, context = case(kind)
    loss, c = coefficients("adpo_softmax", log_ratio, rewards, context)
    entropy_q = -(context.log_q.exp() * context.log_q).sum(-1)
    for alpha, tolerance in ((1.0, 1e-14), (1 - 1e-7, 1e-6)):
        divergence, limit = coefficients("apo", log_ratio, rewards, context_of(rewards, alpha))
        torch.testing.assert_close(limit, c, rtol=0, atol=tolerance)
        torch.testing.assert_close(divergence + entropy_q, loss, rtol=0, atol=10 * tolerance)
    if kind != "equal":
        _, far = coefficients("apo", log_ratio, rewards, context_of(rewards, 0.5))
        assert (far - c).abs().max() > 1e-3


def test_apo_takes_its_settings_from_the_context():
    log_ratio, rewards, _ = case("random")
    alpha = torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    log_q = GroupTargetBuilder(beta_r=BETA_R)(rewards)
    context = GroupContext(log_q, torch.ones_like(rewards), alpha, 0.3, (0.5, 2.0))
    loss, c = coefficients("apo", log_ratio, rewards, context)
    direct = AlphaDivergenceLoss(0.3, (0.5, 2.0))
    assert torch.equal(loss, direct(log_ratio, log_q, alpha))
    assert torch.equal(c, direct.coefficients(log_ratio, log_q, alpha))


@pytest.mark.parametrize("name", ["adpo_pairwise", "adpo_plackett_luce"])
def test_equal_rewards_give_exactly_nothing(name):
    for kind in ("random", "extreme"):
        log_ratio, _, _ = case(kind)
        rewards = torch.full_like(log_ratio, 0.1)
        loss, c = coefficients(name, log_ratio, rewards, context_of(rewards))
        assert (loss == 0).all() and (c == 0).all()


def test_plackett_luce_without_ties_is_the_probability_of_the_ranking():
    """Drawn best first, each with probability exp(u) over what is left."""
    log_ratio, rewards, context = case("random")
    loss, _ = coefficients("adpo_plackett_luce", log_ratio, rewards, context)
    for value, row, reward in zip(loss.tolist(), log_ratio.tolist(), rewards.tolist(), strict=True):
        ranked = [math.exp(x / TAU) for _, x in sorted(zip(reward, row, strict=True), reverse=True)]
        likelihood = math.prod(weight / math.fsum(ranked[k:]) for k, weight in enumerate(ranked))
        assert value == pytest.approx(-math.log(likelihood) / len(ranked), rel=1e-12)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_order_of_answers_and_of_groups_changes_nothing(name):
    log_ratio, rewards, context = case("binary")
    loss, c = coefficients(name, log_ratio, rewards, context)
    answers, groups = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    permuted, permuted_c = coefficients(name, log_ratio[groups][:, answers], *permute(rewards, groups, answers))
    torch.testing.assert_close(permuted, loss[groups], rtol=0, atol=1e-14)
    torch.testing.assert_close(permuted_c, c[groups][:, answers], rtol=0, atol=1e-14)


def permute(rewards, groups, answers):
    return rewards[groups][:, answers], context_of(rewards[groups][:, answers])


@pytest.mark.parametrize("name", BUILT_IN)
def test_tied_answers_of_equal_log_ratio_are_pulled_alike(name):
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.5, 0.0, 1.0]], dtype=torch.float64)
    log_ratio = torch.tensor([[0.3, -0.2, 0.3, 0.9, -0.2, 0.3]], dtype=torch.float64)
    _, c = coefficients(name, log_ratio, rewards, context_of(rewards))
    torch.testing.assert_close(c[0, [0, 0, 1]], c[0, [2, 5, 4]], rtol=0, atol=1e-15)
    assert c[0, 0] < 0 < c[0, 1]  # the loss falls as the better answer's log-prob rises


@pytest.mark.parametrize("name", BUILT_IN)
def test_coefficients_train_alike_in_any_micro_batches(name):
    """sum_i c_i l_i over token log-probs in any pieces has the gradient of the loss itself on whole groups."""
    _, rewards, context = case("random")
    lengths = [random.Random(i).randint(1, 9) for i in range(rewards.numel())]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(sum(lengths), dtype=torch.float64, generator=generator).requires_grad_()
    log_ratio = torch.stack([row.sum() for row in tokens.split(lengths)]).view_as(rewards)
    (whole,) = torch.autograd.grad(GROUP_LOSSES[name]()(log_ratio, rewards, context).mean(), tokens, retain_graph=True)
    _, c = coefficients(name, log_ratio, rewards, context)
    c = (c / len(rewards)).flatten()
    order = random.Random(0).sample(range(len(lengths)), len(lengths))
    total = torch.zeros_like(tokens)
    for start, stop in ((0, 1), (1, 6), (6, 15), (15, len(lengths))):
        part = sum(c[i] * tokens.split(lengths)[i].sum() for i in order[start:stop])
        total += torch.autograd.grad(part, tokens)[0]
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-12)
    alone = [coefficients(name, log_ratio[[g]], rewards[[g]], context_of(rewards[[g]]))[1] for g in range(4)]
    torch.testing.assert_close(torch.cat(alone).flatten() / 4, c, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------------------
# The registry.


def refused(call, *parts):
    """`call` raises a LossError of one line that has all `parts`."""
    with pytest.raises(LossError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


BAD = {
    "scalar": (lambda u: u.sum(), "one value per group", "[4]", "got []"),
    "per_answer": (lambda u: u, "one value per group", "[4, 6]"),
    "no_tensor": (lambda u: 1.0, "one value per group", "float"),
    "constant": (lambda u: torch.ones(len(u)), "no gradient"),
    "detached": (lambda u: u.detach().sum(-1), "no gradient"),
    "nan": (lambda u: u.sum(-1) * torch.tensor([1, 1, math.nan, 1]), "value", "not finite in group 2"),
    "infinite": (lambda u: u.sum(-1) + torch.tensor([0, 0, 0, math.inf]), "value", "not finite in group 3"),
    "nan_gradient": (lambda u: (u * 0).sqrt().sum(-1), "gradient", "not finite in group 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_loss_that_cannot_be_trained_on_is_named(kind):
    function, *parts = BAD[kind]
    group_loss("bad_one")(lambda log_ratio, rewards, context: function(log_ratio))
    refused(lambda: coefficients("bad_one", *case("random")), "group loss 'bad_one'", *parts)


def test_names_are_unique_and_fit_a_command_line():
    for name in BUILT_IN:
        assert name in GROUP_LOSSES
        refused(lambda name=name: group_loss(name)(len), name, "exists already")
    for name in ("", "my loss", "a-b", "a\nb", "é"):
        refused(lambda name=name: group_loss(name)(len), "letters, digits and underscores")
    assert group_loss("Mine_2")(len) is len and GROUP_LOSSES["Mine_2"]() is len


GOOD = """
import torch
from openrlhf_apo.objectives import anchored_log_policy, group_loss

@group_loss("from_file")
def mine(log_ratio, rewards, context):
    return -(context.log_q.exp() * anchored_log_policy(log_ratio, context.tau_anc)).sum(-1)

@group_loss("second")
def other(log_ratio, rewards, context):
    return (log_ratio * rewards).sum(-1)
"""


def test_a_file_is_loaded_once(tmp_path):
    path, link = tmp_path / "mine.py", tmp_path / "link.py"
    path.write_text(GOOD)
    link.symlink_to(path)
    first, again, linked = (load_own_file(str(each)) for each in (path, path, link))
    assert first.losses == again.losses == linked.losses == ("from_file", "second")
    for one, other in zip(
        coefficients("from_file", *case("random")), coefficients("adpo_softmax", *case("random")), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("registers no loss", "@group_loss")),
        (GOOD + "\nraise RuntimeError('first line\\nsecond line')", ("RuntimeError: first line",)),
        (GOOD + "\nassert False", ("AssertionError",)),
        (GOOD + "\nimport sys; sys.exit(3)", ("SystemExit: 3",)),
        (GOOD + "\nimport no_such_module_at_all", ("ModuleNotFoundError", "no_such_module_at_all")),
        (GOOD + "\ndef broken(", ("SyntaxError",)),
        (GOOD.replace("second", "apo"), ("LossError", "'apo' exists already")),
        (None, ("FileNotFoundError",)),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_leaves_nothing_behind(tmp_path, text, parts):
    path, before = tmp_path / "mine.py", dict(GROUP_LOSSES)
    if text is not None:
        path.write_text(text)
    for _ in range(2):  # nor does it count as loaded
        refused(lambda: load_own_file(str(path)), str(path), *parts)
        assert before == GROUP_LOSSES
    path.write_text(GOOD)
    assert load_own_file(str(path)).losses == ("from_file", "second")
