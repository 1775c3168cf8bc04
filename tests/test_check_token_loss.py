"""cli.check_loss on token losses."""

import math
from pathlib import Path

import pytest
import torch
from checked_loss import PLAIN, TOKEN, findings_of

from openrlhf_apo.objectives import TOKEN_LOSSES
from openrlhf_apo.objectives.checking import token_checks
from openrlhf_apo.options.own_file import load_own_file

ROOT = Path(__file__).parents[1]
TOKEN_EXAMPLE = ROOT / "examples" / "python" / "my_token_loss.py"


@pytest.fixture
def check_token(tmp_path, capsys):
    """Run the command on a token loss `mine`."""

    def run(per_token=PLAIN, more="", uses=(), aggregation="sequence", gain=1.0) -> tuple[int, dict[str, str], str]:
        path = tmp_path / "mine.py"
        path.write_text(TOKEN.format(per_token=per_token, more=more, uses=uses, aggregation=aggregation, gain=gain))
        return findings_of(path, capsys)

    return run


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
