"""cli.check_loss: your own loss is examined, and what cannot be trained on is one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checked_loss import PLAIN, TOKEN, findings_of

from openrlhf_apo.cli.check_loss import main
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.objectives.checking.group_checks import CHECKS
from openrlhf_apo.objectives.checking.random_groups import random_batch
from openrlhf_apo.objectives.group_base import coefficients
from openrlhf_apo.options.own_file import load_own_file

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "python" / "my_loss.py"
TOKEN_EXAMPLE = ROOT / "examples" / "python" / "my_token_loss.py"


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
