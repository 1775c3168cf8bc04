"""--dry_run prints what a run would be, and refuses what it would refuse."""

import pytest
from real_runs import DIGITS_REWARD

from openrlhf_apo.cli.train_apo_ray import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def dry(tiny_model, sums, tmp_path, capsys, monkeypatch):
    """Runs the command with --dry_run and a reward file of the given content: -> exit code, stdout, stderr."""
    monkeypatch.setattr("logging.raiseExceptions", False)  # OpenRLHF keeps the stdout of the test that imported it

    def run(*flags: str, reward: str = DIGITS_REWARD) -> tuple[int, str, str]:
        (tmp_path / "reward.py").write_text(reward)
        argv = ["--actor.model_name_or_path", tiny_model, "--data.prompt_dataset", sums, "--data.max_len", "48"]
        argv += ["--reward", str(tmp_path / "reward.py"), "--rollout.batch_size", "16", "--train.batch_size", "64"]
        code = main([*argv, "--ckpt.output_dir", str(tmp_path / "out"), *flags, "--dry_run"])
        assert not (tmp_path / "out").exists()
        return code, *capsys.readouterr()

    return run


def test_a_dry_run_prints_what_was_given_and_by_whom_then_the_sizes_then_all(dry, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("apo: {beta_r: 0.5, tau_anc: 0.7}\n")
    code, out, err = dry("--config", str(path), "--apo.tau_anc", "0.9", reward="print('loud')\n" + DIGITS_REWARD)
    given, sizes, settings = out.split("\n\n")
    assert code == 0 and "error" not in err
    assert f"apo.beta_r: 0.5  ({path})" in given.splitlines()
    assert "apo.tau_anc: 0.9  (command line)" in given.splitlines()
    assert f"reward.remote_url: ['{tmp_path}/reward.py']  (command line)" in given.splitlines()
    assert not any(line.startswith(("ds.", "alpha_mode", "config")) for line in given.splitlines())
    assert sizes == "4 rollouts x 128 samples, 2 optimizer steps each, 8 in all"
    assert "apo.tau_anc: 0.9" in settings.splitlines() and "ds.param_dtype: fp32" in settings.splitlines()


@pytest.mark.parametrize(
    "flags, sizes",
    [
        (["--train.num_episodes", "3"], "12 rollouts x 128 samples, 2 optimizer steps each, 24 in all"),
        (["--data.max_samples", "20"], "2 rollouts x 128 samples, 2 optimizer steps each, 3 in all"),
        (["--data.max_samples", "16"], "1 rollout x 128 samples, 2 optimizer steps each, 2 in all"),
        (["--train.batch_size", "128"], "4 rollouts x 128 samples, 1 optimizer step each, 4 in all"),
        (["--algo.dynamic_filtering_enable"], "at most 4 rollouts x 128 samples, 2 optimizer steps each, 8 in all"),
    ],
)
def test_a_dry_run_counts_rollouts_and_steps(dry, flags, sizes):
    assert sizes in dry(*flags)[1].splitlines()


def one_error(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "") and "Traceback" not in err
    return line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data.prompt_dataset", "/nowhere.jsonl"], "--data.prompt_dataset /nowhere.jsonl: no such file"),
        (["--data.prompt_dataset", "/nowhere"], "cannot read the data set '/nowhere'"),
        (["--data.input_key", "question"], "no column 'question' (--data.input_key)"),
        (["--data.max_samples", "15"], "15 prompts x 1 episodes are fewer than one --rollout.batch_size (16)"),
        (["--eval.dataset", "/nowhere.jsonl", "--eval.ends"], "--eval.dataset /nowhere.jsonl: no such file"),
        (["--actor.lr_scheduler", "cosin"], "--actor.lr_scheduler must be one of linear, cosine, "),
        (["--eval.dataset", "e", "--eval.ends", "--eval.temperature", "-1"], "--eval.temperature must be a number in"),
        (["--rollout.max_new_tokens", "0"], "--rollout.max_new_tokens must be a number in [1, inf), got 0"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(dry, flags, message):
    assert message in one_error(dry(*flags))


REWARD_HEAD = "def reward_func(queries, prompts, labels, **kwargs):\n    "


@pytest.mark.parametrize("isolate", [[], ["--reward.isolate"]], ids=["here", "isolated"])
@pytest.mark.parametrize(
    "reward, message",
    [
        ("def reward_func(:\n", "SyntaxError"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("def score(queries, prompts, labels): ...\n", "reward_func"),
        ("import math\nmath.no_such\n", "module 'math' has no attribute 'no_such'"),
        (REWARD_HEAD + "return [1.0]\n", "for the first row the reward returned [1.0] instead of {'rewards': ...}"),
        (REWARD_HEAD + "return {'rewards': [1.0, 0.0]}\n", "for the first row the reward returned 2 rewards for 1"),
        (REWARD_HEAD + "return {'rewards': [1 / 0]}\n", "raised ZeroDivisionError: division by zero (prompt '0+0='"),
        ("def reward_func(queries):\n    return {}\n", "for the first row the reward raised TypeError: "),
    ],
)
def test_a_dry_run_tries_the_reward_file(dry, tmp_path, reward, message, isolate):
    line = one_error(dry(*isolate, reward=reward))
    assert line.startswith(f"error: the reward {tmp_path}/reward.py") and message in line.replace("\\'", "'")
