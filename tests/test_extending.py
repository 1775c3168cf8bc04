"""A loss or a controller of your own is one file: its flags, checks and refusals follow from what it states."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_alpha
import test_token_losses
import torch

from openrlhf_apo.alpha import CONTROLLERS
from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.objectives.apo import AlphaDivergenceLoss
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.options.own_file import OwnFile, load_own_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = """
from dataclasses import dataclass
import torch
from openrlhf_apo.alpha import AlphaController, alpha_controller
from openrlhf_apo.objectives import ClippedSurrogate, TokenLoss, group_loss, ratio, token_loss
from openrlhf_apo.settings import setting
"""
TOKEN = """
@token_loss("toy")
@dataclass(eq=False)
class Toy(TokenLoss):
    strength: float = setting(0.5, "how strong it is", within="(0, 2]")
    mild: bool = setting(False, "whether it is mild")
    aggregation = "token"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        gain = self.strength * ratio(log_probs, old_log_probs) * advantages
        return -gain, torch.zeros_like(mask, dtype=torch.bool)
"""
CONTROLLER = """
@alpha_controller("steady")
@dataclass(eq=False)
class Steady(AlphaController):
    level: float = setting(0.3, "where it stays", within="[0, 1]")

    def step(self, signals):
        self.metrics = {"alpha": self.level}
        return self.level
"""
GROUP = """
@group_loss("toy_group", uses=("target", "weight_clip"))
@dataclass
class ToyGroup:
    slope: float = setting(1.0, "how steep it is", within="(0, inf)")

    def __call__(self, log_ratio, rewards, context):
        return -self.slope * (context.log_q.exp() * log_ratio).sum(-1)
"""


@pytest.fixture
def file(tmp_path):
    """Writes the file of your own: -> the flags that load it."""

    def write(*parts: str, name: str = "mine.py") -> list[str]:
        (tmp_path / name).write_text(HEAD + "".join(parts))
        return ["--loss_path", str(tmp_path / name)]

    return write


@pytest.fixture
def base(tmp_path, sums) -> list[str]:
    """A command line that is fine."""
    flags = ["--actor.model_name_or_path", str(tmp_path), "--data.prompt_dataset", sums, "--reward", "math_verify"]
    return [*flags, "--rollout.batch_size", "16", "--train.batch_size", "32"]


def plan(argv: list[str]):
    return run_plan(resolve(argv, check_model_folder=False))


def refused(argv: list[str]) -> str:
    with pytest.raises(OptionError) as error:
        plan(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# A token loss.


def test_flags_of_your_own_loss_are_in_help(file, capsys):
    with pytest.raises(SystemExit) as stopped:
        resolve([*file(TOKEN), "--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "toy: how strong it is (default 0.5)" in text and "toy: whether it is mild" in text
    assert "alpha_ppo, g2rpo_a, toy (token losses)" in text


def test_values_of_your_own_loss_arrive_in_the_plan(base, file):
    objective = plan([*base, *file(TOKEN), "--toy.strength", "1.5", "--toy.mild"]).objective
    assert (objective.loss.strength, objective.loss.mild) == (1.5, True)
    objective = plan([*base, *file(TOKEN)]).objective
    assert (objective.loss.strength, objective.loss.mild) == (0.5, False)


def test_values_of_your_own_loss_can_stand_in_the_config_file(base, file, tmp_path):
    (tmp_path / "run.yaml").write_text(f"loss_path: {file(TOKEN)[1]}\ntoy:\n  strength: 0.25\n")
    assert plan([*base, "--config", str(tmp_path / "run.yaml")]).objective.loss.strength == 0.25


def test_values_out_of_range_are_one_line(base, file):
    mine = file(TOKEN)
    assert "strength must be a number in (0, 2], got 2.5" in refused([*base, *mine, "--toy.strength", "2.5"])
    assert "--toy.strength: invalid float value: 'high'" in refused([*base, *mine, "--toy.strength", "high"])
    group = file(GROUP, name="group.py")  # a dataclass of your own that is no Checked
    assert "slope must be a number in (0, inf), got 0" in refused([*base, *group, "--toy_group.slope", "0"])


def test_flags_of_your_own_loss_are_refused_beside_another(base, file):
    message = refused([*base, *file(TOKEN, GROUP), "--loss", "toy_group", "--toy.strength", "1"])
    assert message.startswith("--toy.strength has no effect with --loss toy_group: drop it, or use --loss toy")
    assert "unrecognized arguments: --toy.none" in refused([*base, *file(TOKEN), "--toy.none", "1"])


def test_presets_of_your_own_loss_are_defaults_of_flags_that_exist(base, file):
    preset = '\n    @classmethod\n    def presets(cls, max_new_tokens):\n        return {{"{0}": 0.25}}\n'
    mine = file(TOKEN, preset.format("algo.kl.init_coef"))
    assert plan([*base, *mine]).regularizer.kl == 0.25
    assert plan([*base, *mine, "--algo.kl.init_coef", "0.5"]).regularizer.kl == 0.5
    other = file(TOKEN.replace('"toy"', '"other"'), preset.format("algo.kl.coef"), name="other.py")
    assert "--loss other: its presets name an unknown flag, 'algo.kl.coef'" in refused([*base, *other])


def test_an_inherited_setting_keeps_its_flag_and_takes_the_default_of_your_own(base, file):
    mine = file(
        '@token_loss("toy")\n@dataclass(eq=False)\nclass Toy(ClippedSurrogate):\n'
        '    eps_high: float = 0.7\n    aggregation = "token"\n'
    )
    assert plan([*base, *mine]).objective.loss.eps_high == 0.7
    loss = plan([*base, *mine, "--actor.eps_clip_low_high", "0.1", "0.3"]).objective.loss
    assert (loss.eps_low, loss.eps_high) == (0.1, 0.3)


# ---------------------------------------------------------------------------------------------------------------------
# A group loss and alpha.


def test_flags_beside_your_own_group_loss_are_those_it_declares(base, file):
    mine = file(GROUP)
    assert plan([*base, *mine, "--apo.weight_clip", "0.5", "2"]).objective.divergence.weight_clip == (0.5, 2)
    assert plan([*base, *mine, "--toy_group.slope", "3"]).objective.implementation.slope == 3
    assert "--alpha_mode has no effect with --loss toy_group" in refused([*base, *mine, "--alpha_mode", "fixed"])
    assert "--apo.alpha has no effect with --loss toy_group" in refused([*base, *mine, "--apo.alpha", "0.5"])
    bare = file(GROUP.replace('"target", "weight_clip"', "").replace("toy_group", "bare"), name="bare.py")
    for flag in (["--apo.weight_clip", "0.5", "2"], ["--apo.beta_r", "2"], ["--apo.drop_zero_variance"]):
        assert f"{flag[0]} has no effect with --loss bare" in refused([*base, *bare, *flag])


# ---------------------------------------------------------------------------------------------------------------------
# A controller.


def test_a_controller_of_your_own(base, file, capsys):
    mine = file(CONTROLLER)
    controller = plan([*base, *mine, "--alpha_mode", "steady", "--steady.level", "0.7"]).objective.controller
    assert type(controller) is CONTROLLERS["steady"]
    assert (controller.level, controller.step(None), controller.state_dict()) == (0.7, 0.7, {})
    with pytest.raises(SystemExit):
        resolve([*mine, "--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "steady: where it stays (default 0.3)" in text and "{ess,fixed,guarded,steady}" in text


def test_a_controller_is_refused_where_it_has_no_effect(base, file):
    mine = file(CONTROLLER)
    steady = [*mine, "--alpha_mode", "steady"]
    assert "level must be a number in [0, 1], got 2" in refused([*base, *steady, "--steady.level", "2"])
    assert "--alpha_mode has no effect with --loss grpo" in refused([*base, *steady, "--loss", "grpo"])
    assert "--apo.rho has no effect" in refused([*base, *steady, "--apo.rho", "0.5"])
    assert (
        "--loss_path has no effect with --loss apo --alpha_mode guarded: drop it, or choose --alpha_mode steady"
        in (refused([*base, *mine]))
    )
    both = file(GROUP.replace('"weight_clip"', '"alpha"'), CONTROLLER.replace("steady", "calm"), name="both.py")
    assert "--calm.level has no effect with --alpha_mode guarded: drop it, or use --alpha_mode calm" in (
        refused([*base, *both, "--calm.level", "0.5"])
    )


def test_a_loss_and_a_controller_can_share_a_file(base, file):
    mine = file(GROUP.replace('"weight_clip"', '"alpha"'), CONTROLLER)
    objective = plan([*base, *mine, "--alpha_mode", "steady", "--toy_group.slope", "2"]).objective
    assert (objective.loss, objective.implementation.slope, objective.controller.level) == ("toy_group", 2.0, 0.3)
    objective = plan([*base, *mine, "--loss", "apo", "--alpha_mode", "steady"]).objective
    assert (objective.loss, objective.controller.level) == ("apo", 0.3)
    assert load_own_file(mine[1]) == OwnFile(("toy_group",), ("steady",))


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be loaded.


@pytest.mark.parametrize(
    "text, message",
    [
        (TOKEN.replace('"toy"', '"apo"'), "token loss 'apo' exists already"),
        (TOKEN.replace('"toy"', '"grpo"'), "token loss 'grpo' exists already"),
        (TOKEN.replace('"toy"', '"openrlhf"'), "token loss 'openrlhf' exists already"),
        (GROUP.replace('"toy_group"', '"dapo"'), "group loss 'dapo' exists already"),
        (GROUP.replace('"toy_group"', '"toy"') + TOKEN, "token loss 'toy' exists already"),
        (CONTROLLER.replace('"steady"', '"ess"'), "alpha controller 'ess' exists already"),
        (CONTROLLER.replace('"steady"', '"my-own"'), "alpha controller name 'my-own': use letters, digits"),
        (TOKEN.replace('"toy"', '"actor"'), "flags --actor.* exist already: choose another name than 'actor'"),
        (TOKEN.replace('"toy"', '"guarded"'), "flags --guarded.* exist already"),
        (CONTROLLER.replace('"steady"', '"apo"'), "flags --apo.* exist already"),
        (CONTROLLER.replace('"steady"', '"bapo"'), "flags --bapo.* exist already"),
        (TOKEN + CONTROLLER.replace('"steady"', '"toy"'), "flags --toy.* exist already"),
        (TOKEN.replace('"toy"', '"toy", uses=("alpha",)'), "uses='alpha' is not one of entropy, max_length"),
        (TOKEN.replace('"toy"', '"toy", uses=("entropy")'), "uses must be a tuple, uses=('entropy',)"),
        (TOKEN.replace("(TokenLoss)", ""), "token loss 'toy' must be a class derived from TokenLoss"),
        (TOKEN.replace('"token"', '"mean"'), "has no aggregation: set it to one of token, sequence, constant"),
        (TOKEN.replace("@dataclass(eq=False)\n", ""), "Toy.strength: put @dataclass(eq=False) right above class Toy"),
        (TOKEN.replace("strength: float", "strength: complex"), "is no type for a setting"),
        (TOKEN.replace("strength: float", "strength: tuple[float, int]"), "is no type for a setting"),
        (TOKEN.replace("setting(False,", "setting(True,"), "Toy.mild: a switch is False by default"),
        (
            '@token_loss("toy")\n@dataclass(eq=False)\nclass Toy(Bapo):\n    step = 0.1\n',
            "Toy.step: a default needs its type, step: TYPE = VALUE",
        ),
        (CONTROLLER.replace("(AlphaController)", ""), "'steady' must be a class derived from AlphaController"),
        (CONTROLLER.replace("@dataclass(eq=False)\n", ""), "'steady': put @dataclass(eq=False) right above its class"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_and_leaves_nothing_behind(base, file, text, message):
    before = {*GROUP_LOSSES, *TOKEN_LOSSES, *CONTROLLERS}
    mine = file("from openrlhf_apo.objectives.bapo import Bapo\n", text)
    assert message in refused([*base, *mine])
    assert {*GROUP_LOSSES, *TOKEN_LOSSES, *CONTROLLERS} == before


def test_a_file_can_postpone_its_annotations(base, tmp_path):
    (tmp_path / "mine.py").write_text("from __future__ import annotations\n" + HEAD + TOKEN)
    mine = ["--loss_path", str(tmp_path / "mine.py"), "--toy.strength", "2"]
    assert plan([*base, *mine]).objective.loss.strength == 2


# ---------------------------------------------------------------------------------------------------------------------
# The pages.


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def block(page: str, start: str) -> str:
    (found,) = [text for text in blocks(page) if start in text]
    return found


def test_the_controller_of_the_page_works(base, tmp_path):
    (tmp_path / "my_alpha.py").write_text(block("docs/own_loss.md", '@alpha_controller("my_anneal")'))
    mine = ["--loss_path", str(tmp_path / "my_alpha.py"), "--alpha_mode", "my_anneal", "--my_anneal.steps", "2"]
    controller = plan([*base, *mine]).objective.controller
    values = [controller.step(None) for _ in range(2)]
    resumed = CONTROLLERS["my_anneal"](steps=2)
    resumed.load_state_dict(controller.state_dict())
    assert [*values, resumed.step(None), resumed.step(None)] == pytest.approx([0.9, 0.65, 0.4, 0.4])


@pytest.mark.parametrize("example", ["my_loss.py", "my_token_loss.py"])
def test_the_examples_of_the_page_are_the_files(example):
    text = (ROOT / "examples" / "python" / example).read_text(encoding="utf-8")
    without_docstring = text.split('"""\n\n', 1)[1]
    start = without_docstring.split("(", 1)[0]
    (shown,) = [text for text in blocks("docs/own_loss.md") if text.startswith(start)]
    assert re.sub(r'\n    """.*"""', "", shown) == re.sub(r'\n    """.*"""', "", without_docstring)


@pytest.mark.parametrize("alpha", [0.3, 0.9])
def test_the_example_of_any_alpha_is_apo_where_apo_has_an_alpha(alpha):
    load_own_file(str(ROOT / "examples" / "python" / "any_alpha.py"))
    log_ratio, log_q = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_ratio.requires_grad_()
    context = SimpleNamespace(tau_anc=0.8, log_q=log_q.log_softmax(-1))
    value = GROUP_LOSSES["any_alpha"].implementation(alpha)(log_ratio, None, context)
    apo = AlphaDivergenceLoss(0.8)
    torch.testing.assert_close(value, apo(log_ratio, context.log_q, alpha))
    (gradient,) = torch.autograd.grad(value.sum(), log_ratio)
    torch.testing.assert_close(gradient, apo.coefficients(log_ratio, context.log_q, alpha))


def of_package(package: str, text: str) -> None:
    """Run the text of a file as a module of the package."""
    exec(compile(text, "CONTRIBUTING.md", "exec"), {"__name__": f"{package}.new", "__package__": package})


def test_the_loss_of_the_contributing_page_is_its_formula():
    of_package("openrlhf_apo.objectives", block("CONTRIBUTING.md", '@token_loss("sapo")'))
    names = dict(vars(test_token_losses))
    exec(block("CONTRIBUTING.md", "def sapo("), names)
    for settings in ({}, {"tau_pos": 0.5, "tau_neg": 3.0}):
        case = test_token_losses.make_case("random")
        expected, expected_gradient = test_token_losses.oracle(names["sapo"], case, settings)
        value, gradient = test_token_losses.evaluate(TOKEN_LOSSES["sapo"](**settings), case)
        assert value == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-8)


def test_the_controller_of_the_contributing_page_passes_its_test():
    of_package("openrlhf_apo.alpha", block("CONTRIBUTING.md", '@alpha_controller("anneal")'))
    names = dict(vars(test_alpha))
    exec(block("CONTRIBUTING.md", "def test_annealed_alpha_by_hand"), names)
    names["test_annealed_alpha_by_hand"]()
