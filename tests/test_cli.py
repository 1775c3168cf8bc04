"""The command line: OpenRLHF's flags are all there, and what the user can get wrong is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from openrlhf_apo.cli.train_apo_ray import main, resume_command
from openrlhf_apo.errors import OptionError
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options import resolve, run_plan, start_up_warnings
from openrlhf_apo.options.resolve import make_parser
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
        run_plan(resolve(argv))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_flag_of_openrlhf_is_accepted():
    theirs = {option for action in upstream_parser()._actions for option in action.option_strings}
    result = subprocess.run(
        [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray", "--help", "all"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert len(theirs) > 150
    assert [flag for flag in theirs if flag not in result.stdout] == []


def test_help_is_a_page_of_flags_that_exist(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    page = capsys.readouterr().out
    assert stopped.value.code in (0, None) and len(page.splitlines()) < 60
    assert max(map(len, page.splitlines())) < 120
    assert "--rollout.batch_size" in page and "(default 1e-06)" in page
    known = {option for action in make_parser()._actions for option in action.option_strings}
    assert {word for word in page.split() if word.startswith("--")} - {"--help"} <= known


def test_defaults_without_cuda(base):
    args = resolve(base)
    assert (args.loss, args.alpha_mode) == ("apo", "guarded")
    assert (args.ds.attn_implementation, args.ds.param_dtype, args.actor.num_gpus_per_node) == ("sdpa", "fp32", 1)
    assert (args.vllm.num_engines, args.rollout.n_samples_per_prompt) == (1, 8)
    assert args.algo.kl.init_coef == 0.0


def test_defaults_are_the_papers(base):
    base = [*base, "--rollout.max_new_tokens", "100"]
    settings = {loss: resolve([*base, "--loss", loss]) for loss in [*TOKEN_LOSSES, *GROUP_LOSSES, "openrlhf"]}
    clips = {loss: tuple(args.actor.eps_clip_low_high) for loss, args in settings.items()}
    assert clips["grpo"] == clips["dr_grpo"] == clips["g2rpo_a"] == (0.2, 0.2)
    assert (clips["dapo"], clips["gspo"], clips["cispo"]) == ((0.2, 0.28), (3e-4, 4e-4), (1.0, 4.0))
    kl = {loss: (args.algo.kl.init_coef, args.algo.kl.use_loss) for loss, args in settings.items()}
    assert kl["grpo"] == kl["g2rpo_a"] == (0.04, True) and settings["grpo"].algo.kl.estimator == "k3"
    assert all(kl[loss][0] == 0 for loss in kl if loss not in ("grpo", "g2rpo_a", "openrlhf"))
    assert kl["openrlhf"] == (0.01, False) and settings["openrlhf"].algo.advantage.estimator == "group_norm"
    filtered = [loss for loss, args in settings.items() if args.algo.dynamic_filtering_enable]
    penalised = [loss for loss, args in settings.items() if args.reward.overlong_buffer_len is not None]
    assert filtered == penalised == ["dapo"] and settings["dapo"].reward.overlong_buffer_len == 20
    assert resolve([*base, "--loss", "gspo", "--actor.eps_clip_low_high", "0.1", "0.2"]).actor.eps_clip_low_high == [
        0.1,
        0.2,
    ]
    assert resolve([*base, "--loss", "dapo", "--actor.eps_clip", "0.1"]).actor.eps_clip_low_high == (0.1, 0.1)


def test_a_loss_of_your_own_is_loaded_by_path(base, tmp_path):
    path = tmp_path / "mine.py"
    one = "@group_loss('{0}')\ndef {0}(log_ratio, rewards, context):\n    return log_ratio.square().sum(-1)\n"
    path.write_text("from openrlhf_apo.objectives import group_loss\n" + one.format("cli_a") + one.format("cli_b"))
    try:
        assert resolve([*base, "--loss_path", str(path), "--loss", "cli_a"]).loss == "cli_a"
        assert "cli_a, cli_b: choose one by --loss" in refused([*base, "--loss_path", str(path)])
        assert "--loss_path has no effect with --loss apo" in refused(
            [*base, "--loss_path", str(path), "--loss", "apo"]
        )
        assert "'cli_a' exists already" in refused([*base, "--loss_path", str(_copy(path))])
    finally:
        for name in ("cli_a", "cli_b"):
            GROUP_LOSSES.pop(name, None)


def _copy(path: Path) -> Path:
    other = path.with_name("other.py")
    other.write_text(path.read_text())
    return other


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
        (["--apo.tau", "1"], "unrecognized arguments: --apo.tau 1; did you mean --apo.tau_anc?"),
        (["--train.batchsize=8"], "unrecognized arguments: --train.batchsize=8; did you mean --train.batch_size?"),
        (["--batch_size", "8"], "did you mean --rollout.batch_size or --train.batch_size?"),
        (["--no_such_flag"], "unrecognized arguments"),
        (["--loss", "grpo", "--apo.beta_r", "1"], "--apo.beta_r has no effect with --loss grpo"),
        (["--loss", "grpo", "--alpha_mode", "ess"], "--alpha_mode has no effect with --loss grpo"),
        (["--apo.alpha", "0.5"], "with --alpha_mode guarded: drop it, or use --alpha_mode fixed"),
        (["--apo.anchor_beta", "0.5"], "--apo.anchor_beta has no effect with --apo.anchor rollout"),
        (["--critic.value_clip", "0.5"], "--critic.value_clip has no effect"),
        (["--loss", "grop"], "--loss grop: no such loss; there are adpo_pairwise, adpo_plackett_luce"),
        (["--loss_path", "nowhere.py"], "--loss_path"),
        (["--algo.advantage.estimator", "rloo"], "no effect with --loss apo: drop it, or use --loss openrlhf"),
        (["--loss", "openrlhf", "--algo.advantage.estimator", "gae"], "needs a critic"),
        (["--loss", "openrlhf", "--adrpo.enable"], "--adrpo.enable has no effect with --loss openrlhf"),
        (["--loss", "grpo", "--bapo.rho", "0.4"], "--bapo.rho has no effect with --loss grpo"),
        (["--loss", "bapo", "--bapo.rho", "1.4"], "--loss bapo: rho must be a number in (0, 1), got 1.4"),
        (["--loss", "bapo", "--actor.eps_clip", "0.1"], "--actor.eps_clip has no effect with --loss bapo"),
        (["--actor.eps_clip", "0.1"], "--actor.eps_clip has no effect with --loss apo"),
        (["--loss", "cispo", "--actor.dual_clip", "3"], "--actor.dual_clip has no effect with --loss cispo"),
        (["--loss", "adpo_softmax", "--alpha_mode", "ess"], "--alpha_mode has no effect with --loss adpo_softmax"),
        (["--loss", "adpo_softmax", "--apo.rho", "0.2"], "--apo.rho has no effect with --loss adpo_softmax"),
        (["--loss", "adpo_pairwise", "--apo.beta_r", "2"], "--apo.beta_r has no effect with --loss adpo_pairwise"),
        (["--adrpo.beta_0", "1"], "--adrpo.beta_0 has no effect with --adrpo.enable False"),
        (["--adrpo.enable", "--algo.kl.init_coef", "1"], "the coefficient is --adrpo.beta_0"),
        (["--adrpo.enable", "--adrpo.beta_min", "2"], "beta_min must not be above beta_max"),
        (["--apo.max_generations", "3"], "no effect with --algo.dynamic_filtering_enable False"),
        (["--algo.kl.estimator", "k2"], "--algo.kl.estimator has no effect without KL"),
        (["--reward.overlong_penalty_factor", "2"], "no effect without --reward.overlong_buffer_len"),
        (["--loss", "dr_grpo"], "--loss dr_grpo needs --rollout.max_new_tokens"),
        (["--loss", "dapo"], "--loss dapo needs --rollout.max_new_tokens"),
        (["--rollout.max_new_tokens", "8", "--reward.overlong_buffer_len", "9"], "at most --rollout.max_new_tokens 8"),
        (["--ds.packing_samples"], "--ds.packing_samples needs a GPU"),
        (["--vllm.enable_sleep"], "--vllm.enable_sleep needs a GPU"),
        (["--reward.remote_url", "x.py"], "choose one"),
        (["--reward", "mth_verify"], "--reward mth_verify: no such reward; give --reward FILE.py, a URL (http"),
        (["--reward", "nowhere.py"], "--reward.remote_url nowhere.py: no such file"),
        (["--apo.weight_clip", "2", "1"], "weight_clip"),
        (["--reward.timeout", "0"], "must be above 0"),
        (["--apo.load_rollouts", "/nowhere"], "no rollout_*.jsonl there"),
    ],
)
def test_bad_input_is_one_line(base, flags, message):
    assert message in refused([*base, *flags])


def test_a_mistyped_model_folder_is_refused_before_the_hub_is_asked(base, tmp_path, monkeypatch):
    monkeypatch.setattr("openrlhf_apo.options.check_model._configurations", lambda model: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    for model in ("/no/such/model", "./model", "../model", "~/model", ".cache/tiny", "a/b/model", "model/", "model"):
        message = f"--actor.model_name_or_path {model}: no such folder, and no hub name, OWNER/NAME: correct the path"
        assert refused([*base, "--actor.model_name_or_path", model]) == message
    assert "no hub name" in refused([*base, "--actor.model_name_or_path", "file"])
    assert "runs/model: no such folder in runs" in refused([*base, "--actor.model_name_or_path", "runs/model"])


def test_a_hub_name_is_left_to_the_hub(base, monkeypatch):
    asked = []
    monkeypatch.setattr("openrlhf_apo.options.check_model._configurations", lambda model: asked.append(model) or 1 / 0)
    for model in ("Qwen/Qwen3-1.7B", "org_1/name.v2_b"):
        with pytest.raises(ZeroDivisionError):
            resolve([*base, "--actor.model_name_or_path", model])
    assert asked == ["Qwen/Qwen3-1.7B", "org_1/name.v2_b"]


def test_a_reward_by_path_or_address_is_that_of_remote_url(base, tmp_path):
    (tmp_path / "reward.py").touch()
    base = base[:4] + base[6:]
    for reward in (str(tmp_path / "reward.py"), "http://localhost:1/score", "https://a/1,https://b/2"):
        short, long = (
            resolve([*base, flag, reward, "--reward.max_failures", "2"])
            for flag in ("--reward", "--reward.remote_url")
        )
        assert short.reward == long.reward and short.given == long.given
        assert run_plan(short).reward.parts[0].urls == reward.split(",")


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
def test_bad_data_is_one_line_and_exit_code_2(base, tiny_model, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1="')
    data = ["--actor.model_name_or_path", tiny_model, "--data.prompt_dataset", str(tmp_path / "data.jsonl")]
    code, stderr = run([*base, *data])
    assert code == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be read" in line and "line 1: not JSON" in line
    assert "Traceback" not in stderr


def test_exit_code_of_a_bad_setting(base, capsys):
    assert main([*base, "--apo.tau_anc", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_model_without_a_tokenizer_is_one_line(base, capsys):
    assert main([*base, "--dry_run"]) == 2
    assert f"error: --actor.model_name_or_path {base[1]} has no tokenizer: copy its" in capsys.readouterr().err


def test_config_file_and_command_line(base, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"apo": {"beta_r": 0.5, "drop_zero_variance": True}, "apo.tau_anc": 0.7}))
    args = resolve([*base, "--config", str(path), "--apo.tau_anc", "0.9"])
    assert (args.apo.beta_r, args.apo.tau_anc, args.apo.drop_zero_variance) == (0.5, 0.9, True)
    path.write_text("apo:\n  beta: 1\n")
    assert "unknown flag 'apo.beta'; did you mean apo.beta_r?" in refused([*base, "--config", str(path)])
    path.write_text("loss: apo\nalpha_mode: fixed\ntrain: [1, 2\napo.beta_r: 1\n")
    assert f"--config {path}: line 4: expected ',' or ']'" in refused([*base, "--config", str(path)])
    path.write_text("loss: apo\n\tapo.beta_r: 1\n")
    assert f"--config {path}: line 2: found character" in refused([*base, "--config", str(path)])
    path.write_text("apo.beta_r: high\n")
    assert "invalid float value" in refused([*base, "--config", str(path)])
    path.write_text("loss: grpo\napo.beta_r: 1\n")
    assert "--apo.beta_r has no effect with --loss grpo" in refused([*base, "--config", str(path)])
    assert "--config" in refused([*base, "--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "words, filtered",
    [
        ("", True),
        ("--algo.dynamic_filtering_enable false", False),
        ("--algo.dynamic_filtering_enable --algo.dynamic_filtering_enable False", False),
        ("--algo.dynamic_filtering_enable false --algo.dynamic_filtering_enable true", True),
    ],
)
def test_a_switch_takes_false_and_its_last_word_counts(base, tmp_path, words, filtered):
    path = tmp_path / "run.yaml"
    path.write_text("loss: dapo\nalgo.dynamic_filtering_enable: true\nrollout.max_new_tokens: 9\n")
    for more in (["--config", str(path)], ["--loss", "dapo", "--rollout.max_new_tokens", "9"]):
        args = resolve([*base, *words.split(), *more])
        assert args.algo.dynamic_filtering_enable == filtered
        assert ("algo.dynamic_filtering_enable" in args.given) == (bool(words) or "--config" in more)
    assert resolve([*base, "--loss", "grpo", "--algo.kl.use_loss", "false"]).algo.kl.use_loss is False
    assert resolve([*base, "--loss", "grpo", "--algo.kl.no_use_loss", "false"]).algo.kl.use_loss is True


def test_of_two_config_files_the_later_wins(base, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("apo: {beta_r: 0.5, tau_anc: 0.7, lam: 0.3}")
    second.write_text("apo.tau_anc: 0.6\napo.lam: 0.2")
    args = resolve([*base, "--config", str(first), str(second), "--apo.lam", "0.1"])
    assert (args.apo.beta_r, args.apo.tau_anc, args.apo.lam) == (0.5, 0.6, 0.1)
    origins = [args.given[f"apo.{name}"] for name in ("beta_r", "tau_anc", "lam")]
    assert origins == [str(first), str(second), "command line"]


def test_the_gpu_recipe_passes_every_check(base, monkeypatch):
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    recipe = str(ROOT / "configs" / "qwen3_math3.yaml")
    gpus = ["--actor.num_gpus_per_node", "4", "--vllm.num_engines", "4", "--ds.packing_samples"]
    args = resolve([*base[:4], "--config", recipe, *gpus, "--eval.dataset", base[3]])
    assert args.ds.packing_samples and args.vllm.enable_sleep and args.train.colocate_all
    assert (args.ds.param_dtype, args.ds.attn_implementation) == ("bf16", "flash_attention_2")
    assert args.rollout.batch_size * args.rollout.n_samples_per_prompt // args.train.batch_size == 4
    assert start_up_warnings(args, run_plan(args)) == []


def warnings(argv: list[str]) -> list[str]:
    args = resolve(argv)
    return start_up_warnings(args, run_plan(args))


def test_warns_when_the_guard_cannot_move(base):
    dead = [*base, "--train.batch_size", "128"]
    assert "c_t is 0" in warnings(dead)[0]
    assert warnings(base) == []
    for alive in (["--apo.anchor", "lagged"], ["--train.max_epochs", "2"], ["--apo.confidence", "token"]):
        assert warnings([*dead, *alive]) == []
    assert warnings([*dead, "--alpha_mode", "fixed"]) == []
    assert warnings([*dead, "--apo.anchor", "lagged", "--apo.anchor_interval", "1"]) != []


def test_muon_is_not_clipped_unless_asked(base):
    muon = [*base, "--actor.optim", "muon"]
    assert (resolve(muon).actor.max_norm, resolve(base).actor.max_norm) == (0.0, 1.0)
    assert warnings(muon) == []
    assert "DeepSpeed clips what Muon has made" in warnings([*muon, "--actor.max_norm", "1"])[0]


def test_what_goes_on_from_a_checkpoint_resumes_whatever_was_said_of_it():
    for said in ([], ["--ckpt.load_enable"], ["--ckpt.load_enable", "false"], ["--ckpt.load_enable", "--loss", "apo"]):
        assert resume_command(said).split()[-1] == "--ckpt.load_enable"


def test_warns_of_micro_batches_of_one_sample_where_more_would_fit(base):
    (line,) = warnings([*base, "--train.micro_batch_size", "1", "--data.max_len", "512"])
    assert (
        "8 of --data.max_len 512 tokens would fit. Without it, micro-batches have --train.max_tokens_per_gpu" in line
    )
    assert warnings([*base, "--train.micro_batch_size", "2", "--data.max_len", "512"]) == []
    assert warnings([*base, "--train.micro_batch_size", "1", "--data.max_len", "4096"]) == []
    assert warnings([*base, "--data.max_len", "512"]) == []


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_brings_its_own_code_is_refused_unless_trusted(base, tmp_path, file):
    config = json.loads((Path(base[1]) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    model = [*base, "--actor.model_name_or_path", str(tmp_path)]
    assert "brings its own code: read it, then give --actor.trust_remote_code" in refused(model)
    assert resolve([*model, "--actor.trust_remote_code"]).actor.trust_remote_code
