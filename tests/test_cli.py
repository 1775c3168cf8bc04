"""The command line: OpenRLHF's flags are all there, and what the user can get wrong is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openrlhf_apo.cli.train_apo_ray import main
from openrlhf_apo.options import OptionError, resolve
from openrlhf_apo.options.settings import start_up_warnings
from openrlhf_apo.options.upstream import upstream_parser

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """A command line that is fine: a model's configuration and a data file, no weights."""
    from transformers import Qwen3Config

    path = tmp_path_factory.mktemp("cli")
    Qwen3Config(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32).save_pretrained(path)
    (path / "prompts.jsonl").write_text(json.dumps({"prompt": "1+1=", "label": "2"}) + "\n")
    return [
        "--actor.model_name_or_path",
        str(path),
        "--data.prompt_dataset",
        str(path / "prompts.jsonl"),
        "--reward",
        "math_verify",
        "--rollout.batch_size",
        "16",
        "--train.batch_size",
        "32",
    ]


def refused(argv: list[str]) -> str:
    with pytest.raises(OptionError) as error:
        resolve(argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_flag_of_openrlhf_is_accepted():
    theirs = {option for action in upstream_parser()._actions for option in action.option_strings}
    result = subprocess.run(
        [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert len(theirs) > 150
    assert [flag for flag in theirs if flag not in result.stdout] == []


def test_defaults_without_cuda(base):
    args = resolve(base)
    assert (args.loss, args.alpha_mode) == ("apo", "guarded")
    assert (args.ds.attn_implementation, args.ds.param_dtype, args.actor.num_gpus_per_node) == ("sdpa", "fp32", 1)
    assert (args.vllm.num_engines, args.rollout.n_samples_per_prompt) == (1, 8)
    assert args.algo.kl.init_coef == 0.0


def test_token_losses_are_openrlhfs(base):
    grpo = resolve([*base, "--loss", "grpo"])
    assert (grpo.algo.advantage.estimator, grpo.actor.policy_loss_type) == ("group_norm", "ppo")
    assert grpo.rollout.n_samples_per_prompt == 8 and grpo.algo.kl.init_coef == 0.01
    gspo = resolve([*base, "--loss", "gspo"])
    assert (gspo.actor.policy_loss_type, gspo.actor.eps_clip_low_high) == ("gspo", (3e-4, 4e-4))
    assert resolve([*base, "--loss", "gspo", "--actor.eps_clip_low_high", "0.1", "0.2"]).actor.eps_clip_low_high == [
        0.1,
        0.2,
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rollout.n_samples_per_prompt", "1"], "at least 2 samples"),
        (["--train.batch_size", "20"], "not made of whole groups of 8"),
        (["--rollout.batch_size", "10"], "whole optimizer steps"),
        (["--apo.alpha_min", "0.9"], "alpha_min"),
        (["--apo.tau_anc", "0"], "tau_anc"),
        (["--apo.beta_r", "-1"], "beta_r"),
        (["--alpha_mode", "ess", "--apo.gamma", "1.5"], "gamma"),
        (["--apo.tau", "1"], "unrecognized arguments: --apo.tau"),
        (["--no_such_flag"], "unrecognized arguments"),
        (["--loss", "grpo", "--apo.beta_r", "1"], "--apo.beta_r has no effect with --loss grpo"),
        (["--loss", "grpo", "--alpha_mode", "ess"], "--alpha_mode has no effect with --loss grpo"),
        (["--apo.alpha", "0.5"], "--apo.alpha has no effect with --alpha_mode guarded"),
        (["--apo.anchor_beta", "0.5"], "--apo.anchor_beta has no effect with --apo.anchor rollout"),
        (["--critic.value_clip", "0.5"], "--critic.value_clip has no effect"),
        (["--algo.advantage.estimator", "rloo"], "no effect with --loss apo"),
        (
            ["--loss", "grpo", "--algo.advantage.estimator", "rloo"],
            "--loss grpo is --algo.advantage.estimator group_norm",
        ),
        (["--ds.packing_samples"], "--ds.packing_samples needs a GPU"),
        (["--vllm.enable_sleep"], "--vllm.enable_sleep needs a GPU"),
        (["--reward.remote_url", "x.py"], "choose one"),
        (["--actor.model_name_or_path", "/no/such/model"], "--actor.model_name_or_path /no/such/model"),
        (["--apo.weight_clip", "2", "1"], "weight_clip"),
        (["--reward.timeout", "0"], "must be above 0"),
        (["--apo.load_rollouts", "/nowhere"], "no rollout_*.jsonl there"),
    ],
)
def test_bad_input_is_one_line(base, flags, message):
    assert message in refused([*base, *flags])


def test_missing_arguments_are_named(base):
    assert "--actor.model_name_or_path is missing" in refused([])
    assert "--data.prompt_dataset is missing" in refused(base[:2])
    assert "no reward" in refused(base[:4])
    assert "no such file" in refused([*base[:4], "--reward.remote_url", "nowhere.py"])


def run(argv: list[str]) -> tuple[int, str]:
    command = [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray", *argv]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return result.returncode, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, flags, message",
    [
        (None, [], "cannot read the data set"),
        ("", [], "is empty"),
        ('{"prompt": "1+1=", "label": "2"}\n', ["--data.input_key", "question"], "no column 'question'"),
        ('{"prompt": "1+1=", "label": "2"}\n', ["--data.label_key", "answer"], "no column 'answer'"),
        ('{"prompt": "1+1=", "label": "2"}\n', ["--data.max_len", "3"], "raise --data.max_len"),
        ('{"prompt": "1+1=", "label": "2"}\n', [], "fewer than one --rollout.batch_size"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(base, tiny_model, tmp_path, content, flags, message):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    code, stderr = run([*base, "--actor.model_name_or_path", tiny_model, "--data.prompt_dataset", str(path), *flags])
    assert code == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in stderr


def test_exit_code_and_dry_run(base, capsys):
    assert main([*base, "--apo.tau_anc", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*base, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "apo.tau_anc: 0.8\n" in printed and "ds.param_dtype: fp32\n" in printed


def test_config_file_and_command_line(base, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"apo": {"beta_r": 0.5, "drop_zero_variance": True}, "apo.tau_anc": 0.7}))
    args = resolve([*base, "--config", str(path), "--apo.tau_anc", "0.9"])
    assert (args.apo.beta_r, args.apo.tau_anc, args.apo.drop_zero_variance) == (0.5, 0.9, True)
    path.write_text("apo:\n  beta: 1\n")
    assert "unknown flag 'apo.beta'" in refused([*base, "--config", str(path)])
    path.write_text("apo.beta_r: high\n")
    assert "invalid float value" in refused([*base, "--config", str(path)])
    path.write_text("loss: grpo\napo.beta_r: 1\n")
    assert "--apo.beta_r has no effect with --loss grpo" in refused([*base, "--config", str(path)])
    assert "--config" in refused([*base, "--config", "nowhere.yaml"])


def test_the_gpu_recipe_passes_every_check(base, monkeypatch):
    monkeypatch.setattr("openrlhf_apo.options.settings.has_cuda", lambda: True)
    recipe = str(ROOT / "configs" / "qwen3_math3.yaml")
    gpus = ["--actor.num_gpus_per_node", "4", "--vllm.num_engines", "4"]
    args = resolve([*base[:4], "--config", recipe, *gpus, "--eval.dataset", base[3]])
    assert args.ds.packing_samples and args.vllm.enable_sleep and args.train.colocate_all
    assert (args.ds.param_dtype, args.ds.attn_implementation) == ("bf16", "flash_attention_2")
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt // args.train.batch_size == 4
    assert start_up_warnings(args) == []


def test_warns_when_the_guard_cannot_move(base):
    dead = [*base, "--train.batch_size", "128"]
    assert "c_t is 0" in start_up_warnings(resolve(dead))[0]
    assert start_up_warnings(resolve(base)) == []
    for alive in (["--apo.anchor", "lagged"], ["--train.max_epochs", "2"], ["--apo.confidence", "token"]):
        assert start_up_warnings(resolve([*dead, *alive])) == []
    assert start_up_warnings(resolve([*dead, "--alpha_mode", "fixed"])) == []
    assert start_up_warnings(resolve([*dead, "--apo.anchor", "lagged", "--apo.anchor_interval", "1"])) != []
