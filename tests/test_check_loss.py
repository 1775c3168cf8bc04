"""cli.check_loss: your own loss is examined, and what cannot be trained on is one line and exit code 2."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_apo.cli.check_loss import main
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.objectives.checking import token_checks
from openrlhf_apo.objectives.checking.group_checks import CHECKS
from openrlhf_apo.objectives.checking.random_groups import random_batch
from openrlhf_apo.objectives.group_base import coefficients
from openrlhf_apo.options.own_file import load_own_file

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "python" / "my_loss.py"
TOKEN_EXAMPLE = ROOT / "examples" / "python" / "my_token_loss.py"


def findings_of(path: Path, capsys) -> tuple[int, dict[str, str], str]:
    """Run the command on a file of one loss: (exit code, {label: finding}, stderr)."""
    code = main([str(path)])
    out, err = capsys.readouterr()
    return code, {line[2:28].strip(): line[28:] for line in out.splitlines() if line.startswith("  ")}, err


@pytest.fixture
def check(tmp_path, capsys):
    """Run the command on a group loss `mine` of the given body."""

    def run(body: str, uses: tuple[str, ...] = ("target", "alpha")) -> tuple[int, dict[str, str], str]:
        path = tmp_path / "mine.py"
        path.write_text(
            "import torch\nfrom openrlhf_apo.objectives import group_loss\n"
            f"@group_loss('mine', uses={uses})\ndef mine(log_ratio, rewards, context):\n    {body}\n"
        )
        return findings_of(path, capsys)

    return run


TOKEN = """
import threading
from dataclasses import dataclass
import torch
from openrlhf_apo.objectives import Terms, TokenLoss, ratio, token_loss
from openrlhf_apo.settings import setting

@token_loss("mine", uses={uses})
@dataclass(eq=False)
class Mine(TokenLoss):
    gain: float = setting({gain}, "a factor", within="(0, 10]")
    aggregation = "{aggregation}"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        r, none = ratio(log_probs, old_log_probs), torch.zeros_like(mask, dtype=torch.bool)
        {per_token}

{more}
"""
PLAIN = "return -self.gain * r * advantages, none"


@pytest.fixture
def check_token(tmp_path, capsys):
    """Run the command on a token loss `mine`."""

    def run(per_token=PLAIN, more="", uses=(), aggregation="sequence", gain=1.0) -> tuple[int, dict[str, str], str]:
        path = tmp_path / "mine.py"
        path.write_text(TOKEN.format(per_token=per_token, more=more, uses=uses, aggregation=aggregation, gain=gain))
        return findings_of(path, capsys)

    return run


@pytest.mark.parametrize("example, name", [(EXAMPLE, "my_adpo_softmax"), (TOKEN_EXAMPLE, "my_sapo")])
def test_the_example_passes(example, name):
    result = subprocess.run(
        [sys.executable, "-m", "openrlhf_apo.cli.check_loss", str(example)], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == name
    assert result.stdout in (ROOT / "docs" / "own_loss.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("log_ratio", ["anchor", "moderate", "large"])
@pytest.mark.parametrize("rewards", ["equal", "binary", "graded"])
def test_the_example_is_the_built_in_adpo_softmax(rewards, log_ratio):
    assert load_own_file(str(EXAMPLE)).losses == ("my_adpo_softmax",)
    batch = random_batch((5, 6), rewards, log_ratio)
    arguments = batch.log_ratio, batch.rewards, batch.context
    for own, built_in in zip(
        coefficients("my_adpo_softmax", *arguments), coefficients("adpo_softmax", *arguments), strict=True
    ):
        torch.testing.assert_close(own, built_in, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["apo", "adpo_softmax", "adpo_pairwise", "adpo_plackett_luce"])
def test_built_in_losses_pass(name):
    findings = {label: finding(name) for label, finding in CHECKS.items()}
    assert findings["shape"] == "[G], float64"
    assert findings["finite"].startswith("value and gradient, also with")
    assert findings["gradient"] == "that of the value, by finite differences"
    assert findings["equal rewards, at anchor"] == "zero"
    assert findings["sum of c per group"].startswith("zero")
    assert findings["better answers"] == "they rise, at the anchor"
    assert findings["alpha"] == ("matters" if name == "apo" else "does not matter")


@pytest.mark.parametrize(
    "body, message",
    [
        ("return (log_ratio * rewards).mean()", "must return one value per group, shape [3], got []"),
        ("return log_ratio * rewards", "got [3, 2]"),
        ("return (log_ratio * rewards).sum(0)", "got [2]"),
        ("return 0.0", "got float"),
        ("return rewards.sum(-1)", "does not depend on log_ratio"),
        ("return (log_ratio.detach() * rewards).sum(-1).requires_grad_()", "fails at G = 3, P = 2: RuntimeError"),
        ("return (0 * log_ratio * rewards).sum(-1)", "gradient zero everywhere"),
        ("return (log_ratio * rewards / rewards.std(-1, keepdim=True)).sum(-1)", "value that is not finite in group"),
        ("return (log_ratio * rewards).sum(-1).square().sqrt()", "gradient that is not finite in group"),
        ("return (log_ratio * (rewards - rewards.mean())).sum(-1)", "depends on which groups share a step"),
        ("return (log_ratio * rewards).sum(-1) / len(rewards)", "depends on which groups share a step"),
        ("return (log_ratio * rewards).sum(-1).squeeze()", "shape [1], got []"),
        ("return (log_ratio[:, :1] * rewards).sum(-1)", "not permutation equivariant"),
        (  # ties in the order of the answers
            "order = rewards.argsort(stable=True, descending=True)\n"
            "    return (log_ratio.gather(-1, order) * torch.arange(rewards.shape[1])).sum(-1)",
            "not permutation equivariant",
        ),
        ("return (log_ratio * rewards * torch.rand(())).sum(-1)", "is it random?"),
        ("rewards -= 1\n    return (log_ratio * rewards).sum(-1)", "changes its inputs in place"),
        ("return (log_ratio * rewads).sum(-1)", "fails at G = 3, P = 2: NameError: name 'rewads' is not defined"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(check, body, message):
    code, _, err = check(body)
    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("error: group loss 'mine' ")
    assert message in err


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("def broken(:\n", "SyntaxError"),
        ("import no_such_module_of_mine\n", "no_such_module_of_mine"),
        ("x = 1\n", "registers no loss"),
        (
            "from dataclasses import dataclass\nfrom openrlhf_apo.alpha import AlphaController, alpha_controller\n"
            "@alpha_controller('mine')\n@dataclass(eq=False)\nclass Mine(AlphaController): ...\n",
            "registers no loss: there is nothing to check",
        ),
        (
            "from openrlhf_apo.objectives import group_loss\n@group_loss('apo')\ndef mine(x, r, c): ...\n",
            "group loss 'apo' exists already",
        ),
    ],
)
def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ")
    assert message in err


GROUP_FILE = """
from openrlhf_apo.objectives import group_loss

@group_loss('{name}')
def mine(log_ratio, rewards, context):
    return -(context.log_q.exp() * log_ratio).sum(-1)
"""


@pytest.mark.parametrize("kind", ["group", "token"])
@pytest.mark.parametrize("name", [*GROUP_LOSSES, *TOKEN_LOSSES, "openrlhf"])
def test_a_built_in_name_is_taken_for_a_loss_of_either_kind(tmp_path, capsys, kind, name):
    token_file = TOKEN.format(per_token=PLAIN, more="", uses=(), aggregation="sequence", gain=1.0)
    (tmp_path / "mine.py").write_text(
        GROUP_FILE.format(name=name) if kind == "group" else token_file.replace('"mine"', f'"{name}"')
    )
    assert main([str(tmp_path / "mine.py")]) == 2
    message = f"cannot be loaded: LossError: {kind} loss '{name}' exists already: choose another name\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    "body, label, finding",
    [
        ("return (log_ratio.float() * rewards.float()).sum(-1)", "shape", "float32"),
        ("return ((20 * log_ratio).exp() * rewards).sum(-1)", "finite", "stop at log_ratio ±50 nats"),
        ("return (log_ratio * rewards / context.lengths.log()).sum(-1)", "finite", "stop at lengths of 1"),
        ("return (log_ratio.detach().exp() * log_ratio * rewards).sum(-1)", "gradient", "not that of the value"),
        ("return (log_ratio * rewards).sum(-1)", "equal rewards, at anchor", "|c| up to 1: groups of equal rewards"),
        ("return (log_ratio.square() + log_ratio * rewards).sum(-1)", "equal rewards, at anchor", "trained on"),
        ("return (log_ratio - log_ratio.mean(-1, True) + rewards).square().sum(-1)", "equal rewards, off it", "back"),
        ("return (log_ratio * rewards).sum(-1)", "sum of c per group", "not zero"),
        ("return (log_ratio * rewards).sum(-1)", "better answers", "is the sign right?"),
        ("return (log_ratio.square() * rewards).sum(-1)", "better answers", "rise in 0 and fall in 0 of 16 groups"),
        ("return (log_ratio.square() * rewards).sum(-1)", "scale", "zero at the anchor"),
        ("return (context.alpha * log_ratio * rewards).sum(-1)", "alpha", "--apo.ess_scope group would be wrong"),
        ("return context.alpha * (log_ratio * rewards).sum(-1)", "alpha", "matters"),
        (
            "return (log_ratio * rewards).sum(-1)",
            "alpha",
            "declared but does not matter: --alpha_mode would be logged",
        ),
        (
            "return (log_ratio * rewards).sum(-1)",
            "uses",
            "alpha is declared, but context.alpha is never read: --alpha_mode would be logged to no effect; target is "
            "declared, but context.log_q is never read: --apo.beta_r would have no effect; drop it from uses=",
        ),
        (
            "return (context.alpha * context.log_q.exp() * log_ratio).sum(-1)",
            "uses",
            "alpha, target: declared and read",
        ),
    ],
)
def test_what_is_legal_is_reported_and_passes(check, body, label, finding):
    code, findings, err = check(body)
    assert (code, err) == (0, "")
    assert finding in findings[label]
    assert list(findings) == list(CHECKS)


def test_scale_is_relative_to_apo(check):
    body = (
        "from openrlhf_apo.objectives import AlphaDivergenceLoss\n"
        "    return 3 * AlphaDivergenceLoss(context.tau_anc)(log_ratio, context.log_q, context.alpha)"
    )
    assert "3 x apo's" in check(body)[1]["scale"]


def test_every_loss_of_a_file_is_checked_in_turn(tmp_path, capsys):
    path = tmp_path / "two.py"
    path.write_text(
        EXAMPLE.read_text().replace('"my_', '"first_') + "\n\n@group_loss('second')\ndef f(x, r, c): ...\n"
    )
    assert main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith(" ")] == ["first_adpo_softmax", "second"]
    assert err.startswith("error: group loss 'second' must return one value per group")


def test_a_group_loss_cannot_read_what_it_does_not_declare(check):
    code, _, err = check("return (context.alpha * context.log_q.exp() * log_ratio).sum(-1)", uses=("target",))
    assert code == 2
    assert err == (
        "error: group loss 'mine' reads context.alpha without saying so: @group_loss('mine', "
        "uses=('target', 'alpha',))\n"
    )


def test_settings_of_your_own_group_loss_are_checked(tmp_path, capsys):
    path = tmp_path / "mine.py"
    text = (
        "from dataclasses import dataclass\nfrom openrlhf_apo.objectives import group_loss\n"
        "from openrlhf_apo.settings import setting\n@group_loss('{name}', uses=())\n@dataclass\nclass Mine:\n"
        "    slope: float = setting({slope}, 'how steep', within='(0, 1]')\n"
        "    def __call__(self, log_ratio, rewards, context):\n"
        "        return -self.slope * (log_ratio * rewards).sum(-1)\n"
    )
    path.write_text(text.format(name="mine", slope=0.5))
    code, findings, err = findings_of(path, capsys)
    assert (code, err, findings["settings"], findings["uses"]) == (0, "", "slope = 0.5", "none")
    path = tmp_path / "steep.py"
    path.write_text(text.format(name="steep", slope=2.0))
    code, findings, err = findings_of(path, capsys)
    assert (code, findings) == (2, {})
    assert err == (
        "error: group loss 'steep' cannot be built with its defaults: slope must be a number in (0, 1], got 2.0\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Token losses.


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_built_in_token_losses_pass(name):
    findings = {label: check(name) for label, check in token_checks.CHECKS.items()}
    assert findings["finite"].startswith("value and gradient, also with")
    assert findings["better answers"] == "they rise, at ratio 1"
    assert findings["gradient"].startswith("the gradient is not" if name == "cispo" else "that of the value")
    assert findings["equal rewards, ratio 1"].startswith("not zero" if name == "gtpo" else "zero")
    assert findings["equal rewards, off it"].startswith("not zero" if name in ("gtpo", "alpha_ppo") else "zero")
    assert findings["state"] == ("initial_entropy: survives a checkpoint" if name == "gtpo" else "none")
    uses = ", ".join(TOKEN_LOSSES[name].uses)
    assert findings["uses"] == (f"{uses}: declared and read" if uses else "none")


def terms(body: str) -> str:
    return f"    def terms(self, step):\n        terms = super().terms(step)\n        {body}\n"


STATEFUL = "    seen = 0.0\n" + terms(
    "self.seen += 1.0; terms.columns['advantage'] *= self.seen; return terms\n\n    {}"
)


@pytest.mark.parametrize(
    "loss, message",
    [
        # terms
        ({"more": terms("del terms.columns['weight']; return terms")}, "the columns advantage and weight from terms"),
        ({"more": terms("terms.columns['kl'] = terms.columns['weight']; return terms")}, "the columns advantage and"),
        ({"more": terms("return terms.columns")}, "must return Terms with the columns"),
        (
            {"more": terms("terms.columns['weight'] = terms.columns['weight'].float(); return terms")},
            "must give column weight as float64 [6], got torch.float32 [6]",
        ),
        (
            {"more": "    def advantages(self, rewards):\n        return rewards.mean(-1)\n"},
            "must give column advantage as float64 [6], got torch.float64 [3]",
        ),
        (
            {"more": "    def advantages(self, rewards):\n        return rewards / rewards.std(-1, keepdim=True)\n"},
            "a value in column advantage that is not finite, nan (reward 0, ",
        ),
        ({"more": terms("terms.token_weights = [[1.0]] * 6; return terms")}, "one number per token of each answer"),
        (
            {"more": terms("terms.metrics['x'] = float('nan'); return terms")},
            "no finite number, x = nan: leave it out",
        ),
        ({"more": terms("step.rewards.zero_(); return terms")}, "changes its inputs in place in terms"),
        ({"more": terms("step.entropies.zero_(); return terms"), "uses": ("entropy",)}, "inputs in place in terms"),
        ({"more": terms("return term")}, "fails in terms: NameError: name 'term' is not defined"),
        # what is declared
        ({"aggregation": "constant"}, "step.max_length was not declared: add 'max_length' to uses= of @token_loss"),
        ({"more": terms("step.entropies.mean(); return terms")}, "step.entropies was not declared: add 'entropy' to"),
        ({"gain": 11.0}, "cannot be built with its defaults: gain must be a number in (0, 10], got 11.0"),
        # per_token
        ({"per_token": "return -r * advantages"}, "must return two tensors from per_token, (loss, clipped)"),
        (
            {"per_token": "return (-r * advantages).sum(-1), none"},
            "must return loss from per_token as torch.float32 [B",
        ),
        (
            {"per_token": "return -r.double() * advantages, none"},
            "as torch.float32 [B, T] = [6, 9], got torch.float64",
        ),
        ({"per_token": "return -r * advantages, mask"}, "must return clipped from per_token as torch.bool"),
        ({"per_token": "return -r.detach() * advantages, none"}, "does not depend on log_probs: it has no gradient"),
        ({"per_token": "return 0 * r * advantages, none"}, "gradient zero everywhere"),
        ({"per_token": "return -r * advantages.sum(-1, True), none"}, "takes advantages of [B, T] for others"),
        ({"per_token": "return -(r - 1).abs().sqrt() * advantages, none"}, "gradient that is not finite (reward"),
        ({"per_token": "return -r * advantages / (r - 1), none"}, "has a value that is not finite (reward"),
        ({"per_token": "old_log_probs -= 1; return -r * advantages, none"}, "inputs in place in per_token"),
        ({"per_token": "log_probs -= 1; return -r * advantages, none"}, "inputs in place in per_token"),
        ({"per_token": "advantages *= 2; return -r * advantages, none"}, "inputs in place in per_token"),
        (
            {"per_token": "r = r.exp(); s = r * 1; r += 1; return -s * advantages, none"},
            "has a gradient that cannot be computed: RuntimeError: one of the variables needed for gradient",
        ),
        ({"per_token": "return -r * advantages * torch.rand(()), none"}, "is it random?"),
        # padding, micro-batches, order
        ({"per_token": "return -r.mean(-1, True) * advantages + 0 * r, none"}, "multiply by mask before any sum"),
        ({"per_token": "return -(r * mask).sum(-1, True).expand_as(r) * advantages / r.shape[-1], none"}, "by mask"),
        (
            {"per_token": "return -r * (advantages - advantages.mean()), none"},
            "per_token may look at its own row only",
        ),
        ({"per_token": "return -r * advantages / len(r), none"}, "share a micro-batch, one or all 8: per_token"),
        (
            {"more": "    def advantages(self, rewards):\n        return rewards - rewards[:, :1]\n"},
            "depends on the order of a group's answers",
        ),
        # the state
        ({"more": STATEFUL.format("")}, "goes on differently from a checkpoint: state_dict must hold all"),
        (
            {"more": STATEFUL.format("def state_dict(self):\n        return {'seen': self.seen}")},
            'does not restore its state: {"seen": 1.0} was saved, and after load_state_dict it is {"seen": 0.0}',
        ),
        (
            {"more": STATEFUL.format("def state_dict(self):\n        return {'seen': torch.tensor(self.seen)}")},
            "has a state_dict that JSON cannot hold: TypeError",
        ),
        # to the ranks
        (
            {"more": "    def __post_init__(self):\n        self.lock = threading.Lock()\n"},
            "cannot be sent to the ranks",
        ),
    ],
)
def test_a_token_loss_that_cannot_be_trained_on_is_one_line(check_token, loss, message):
    code, _, err = check_token(**loss)
    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("error: token loss 'mine' ")
    assert message in err


@pytest.mark.parametrize(
    "loss, label, finding",
    [
        ({}, "settings", "gain = 1.0"),
        ({"gain": 3.0}, "scale", "3 x grpo's"),
        ({"per_token": "return -r.log() * 0 * advantages + (r - 1).square() * advantages, none"}, "scale", "zero at"),
        ({"per_token": "return -r.square().exp() * advantages, none"}, "finite", "stop at log-ratios of ±50 nats"),
        (
            {"per_token": "return -(0.1 * mask).sum(-1, True).exp() * r * advantages, none"},
            "finite",
            "lengths of 1 and",
        ),
        ({"per_token": "return -r.detach() * advantages * log_probs, none"}, "gradient", "not that of the value"),
        ({"per_token": "return r * advantages, none"}, "better answers", "is the sign right?"),
        ({"per_token": "return -r * (advantages + 1), none"}, "equal rewards, ratio 1", "will be trained on"),
        ({"per_token": "return -r * advantages + (r - 1).square(), none"}, "equal rewards, ratio 1", "zero"),
        ({"per_token": "return -r * advantages + (r - 1).square(), none"}, "equal rewards, off it", "not zero"),
        ({"uses": ("entropy",)}, "uses", "entropy is declared, but step.entropies is never read: it costs a forward"),
        ({"uses": ("max_length",)}, "uses", "step.max_length is never read: --rollout.max_new_tokens would be asked"),
        ({"uses": ("max_length",), "aggregation": "constant"}, "uses", "max_length: declared and read"),
        (
            {
                "more": STATEFUL.format(
                    "def state_dict(self):\n        return {'seen': self.seen}\n\n"
                    "    def load_state_dict(self, state):\n        self.seen = state['seen']"
                )
            },
            "state",
            "seen: survives a checkpoint",
        ),
    ],
)
def test_what_is_legal_of_a_token_loss_is_reported_and_passes(check_token, loss, label, finding):
    code, findings, err = check_token(**loss)
    assert (code, err) == (0, "")
    assert finding in findings[label]
    assert list(findings) == [*token_checks.CHECKS, "ranks"]


def test_the_token_example_is_its_formula():
    load_own_file(str(TOKEN_EXAMPLE))
    loss = TOKEN_LOSSES["my_sapo"](tau_pos=0.5, tau_neg=2.0)
    new, old = torch.tensor([[-1.0, -2.0]], dtype=torch.float64), torch.tensor([[-1.5, -1.5]], dtype=torch.float64)
    for advantage, tau in ((0.7, 0.5), (-0.7, 2.0)):
        value, clipped = loss.per_token(new, old, torch.tensor([[advantage]]), torch.ones_like(new))
        expected = [-4 / tau / (1 + math.exp(-tau * (math.exp(x) - 1))) * advantage for x in (0.5, -0.5)]
        assert value.tolist() == [pytest.approx(expected, rel=1e-6)] and not clipped.any()
