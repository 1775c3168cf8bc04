"""What a newcomer mistypes: each is one line that names the fix, and exit code 2, before anything starts."""

import json
import os
import subprocess
import sys

import pytest
from real_runs import DIGITS_REWARD

from openrlhf_apo.cli import check_loss, compare, evaluate, report, samples, train_apo_ray

pytestmark = pytest.mark.filterwarnings("ignore")

# A command that is right. {here} is a folder with FILES in it, {model} a model, {sums} its prompts.
COMMAND = {
    "--actor.model_name_or_path": "{model}",
    "--data.prompt_dataset": "{sums}",
    "--reward": "{here}/reward.py",
    "--data.max_len": "48",
    "--rollout.batch_size": "16",
    "--train.batch_size": "64",
    "--ckpt.output_dir": "{here}/out",
    "--ckpt.path": "{here}/out/ckpt",
}
HEAD = "def reward_func(queries, prompts, labels, **kwargs):\n    "
FILES = {
    "reward.py": DIGITS_REWARD,
    "colon.py": "def reward_func(queries, prompts, labels)\n    return {}\n",
    "import.py": "import numpyy\n" + HEAD + "return {'rewards': [1.0]}\n",
    "name.py": "def reward(queries, prompts, labels):\n    return {'rewards': [1.0]}\n",
    "number.py": HEAD + "return 1.0\n",
    "typo.py": HEAD + "return {'rewards': [len(query)]}\n",
    "words.txt": "1+1=\n",
    "torn.jsonl": '{"prompt": "1+1=", "label": "2"}\n{"prompt": "1+2=", "label": \n',
    "empty.jsonl": "",
    "question.jsonl": '{"question": "1+1=", "answer": "2"}\n' * 16,
    "answer.jsonl": '{"prompt": "1+1=", "answer": "2"}\n' * 16,
    "blank.jsonl": '{"prompt": "1+1=", "label": "2"}\n' * 15 + '{"prompt": "1+1=", "label": ""}\n',
    "long.jsonl": json.dumps({"prompt": "1+" * 99, "label": "2"}) + "\n",
    "key.yaml": "apo:\n  beta: 1\n",
    "value.yaml": "apo.beta_r: high\n",
    "tab.yaml": "train:\n\tseed: 1\n",
    "list.yaml": "- loss\n- apo\n",
    "switch.yaml": "data.apply_chat_template: 'yes'\n",
    "loss.py": "from openrlhf_apo.objectives import group_los\n",
    "no_loss.py": "def my_loss(log_ratio, rewards, context): ...\n",
    "compare.yaml": "arms: {}\n",
    "model/config.json": "{}",
}

# (what is added to the command, words of the line); `-FLAG` leaves a flag out.
MISTAKES = [
    # A flag's name.
    ("--train.batchsize 8", "did you mean --train.batch_size?"),
    ("--batch_size 8", "did you mean --rollout.batch_size or --train.batch_size?"),
    ("--lr 1e-5", "--actor.adam.lr"),
    ("--model x", "--actor.model_name_or_path"),
    ("--dataset x", "--data.prompt_dataset"),
    ("--max_tokens 8", "--rollout.max_new_tokens"),
    ("--alpha 0.5", "did you mean --alpha_ppo.alpha or --apo.alpha or --ds.lora.alpha?"),
    ("--apo.tau 1", "did you mean --apo.tau_anc?"),
    ("--rollout.n_sample_per_prompt 4", "did you mean --rollout.n_samples_per_prompt?"),
    ("—loss apo", "did you mean --loss?"),
    ("-loss apo", "did you mean --loss?"),
    ("loss=apo", "did you mean --loss?"),
    ("--data.apply_chat_template yes", "--data.apply_chat_template is a switch: drop 'yes', or say false"),
    ("--rollout.batch_size", "--rollout.batch_size: expected one argument"),
    # A value.
    ("--loss grop", "no such loss; there are"),
    ("--alpha_mode guard", "guarded"),
    ("--apo.device gpu", "cuda"),
    ("--apo.beta_r high", "--apo.beta_r: invalid float value: 'high'"),
    ("--actor.adam.lr 1e-5x", "--actor.adam.lr: invalid float value"),
    ("--actor.adam.lr -1", "--actor.adam.lr must be a number in [0, inf), got -1"),
    ("--train.max_epochs 1.5", "--train.max_epochs: invalid int value"),
    ("--train.num_episodes 0", "--train.num_episodes must be a number in [1, inf)"),
    ("--train.seed abc", "--train.seed: invalid int value"),
    ("--actor.lr_scheduler cosin", "--actor.lr_scheduler must be one of linear, cosine"),
    ("--alpha_mode fixed --apo.alpha 1.5", "alpha must be a number in [0, 1], got 1.5"),
    ("--apo.tau_anc 0", "tau_anc must be a number in (0, inf), got 0"),
    ("--rollout.temperature 0", "--rollout.temperature must be a number in (0, inf)"),
    ("--rollout.top_p 1.5", "--rollout.top_p must be a number in (0, 1]"),
    # Values that do not go together.
    ("--rollout.n_samples_per_prompt 1", "a group needs at least 2 samples"),
    ("--train.batch_size 20", "use a multiple of 8"),
    ("--rollout.batch_size 10", "not made of whole optimizer steps of --train.batch_size 64"),
    ("--rollout.batch_size 1024", "fewer than one --rollout.batch_size (1024)"),
    ("--rollout.max_new_tokens 64", "--data.max_len 48 leaves no room for a prompt"),
    ("--apo.alpha 0.5", "drop it, or use --alpha_mode fixed"),
    ("--loss grpo --apo.tau_anc 1", "--apo.tau_anc has no effect with --loss grpo: drop it"),
    ("--eval.dataset {sums}", "give one of them, or drop it"),
    ("--critic.value_clip 0.5", "has no effect here: drop it (there is no critic)"),
    ("--ds.packing_samples --apo.device cpu", "--ds.packing_samples needs a GPU: drop it"),
    ("--runtime embedded --vllm.num_engines 2", "drop it, or use --runtime ray"),
    # Something is missing.
    ("-actor.model_name_or_path", "--actor.model_name_or_path is missing: a Hugging Face folder or hub name"),
    ("-data.prompt_dataset", "--data.prompt_dataset is missing: a file, folder or hub name"),
    ("-reward", "no reward: give --reward FILE.py, a URL (http://...) or math_verify"),
    # The model.
    ("--actor.model_name_or_path {here}/modle", "no such folder, and no hub name, OWNER/NAME: correct the path"),
    ("--actor.model_name_or_path {here}", "no config.json there"),
    ("--actor.model_name_or_path {here}/model", "model_type"),
    ("--data.apply_chat_template", "has no chat template: leave --data.apply_chat_template out"),
    # The data.
    ("--data.prompt_dataset {here}/nowhere.jsonl", "nowhere.jsonl: no such file: correct the path"),
    ("--data.prompt_dataset {here}/words.txt", "words.txt' is no file of rows: give one that ends with .jsonl"),
    ("--data.prompt_dataset {here}/torn.jsonl", "torn.jsonl"),
    ("--data.prompt_dataset {here}/empty.jsonl", "empty.jsonl"),
    ("--data.prompt_dataset {here}/question.jsonl", "no column 'prompt' (--data.input_key); it has question, answer"),
    (
        "--data.prompt_dataset {here}/answer.jsonl --reward math_verify",
        "no column 'label' (--data.label_key); it has prompt, answer",
    ),
    ("--data.prompt_dataset {here}/blank.jsonl --reward math_verify", "row 16"),
    ("--data.prompt_dataset {here}/long.jsonl", "raise --data.max_len or filter the data"),
    ("--apo.load_rollouts {here} -data.prompt_dataset -reward -data.max_len", "no rollout_*.jsonl there"),
    # The reward.
    ("--reward math", "--reward math: no such reward; give --reward FILE.py, a URL (http://...) or math_verify"),
    ("--reward {here}/rewrad.py", "rewrad.py: no such file"),
    ("--reward {here}/colon.py", "SyntaxError: expected ':'"),
    ("--reward {here}/import.py", "No module named 'numpyy'"),
    ("--reward {here}/name.py", "it has no reward_func(queries, prompts, labels)"),
    ("--reward {here}/number.py", "returned 1.0 instead of {{'rewards': ...}}"),
    ("--reward {here}/typo.py", "NameError: name 'query' is not defined"),
    # Files of settings and losses.
    ("--config {here}/nowhere.yaml", "nowhere.yaml: [Errno 2] No such file or directory"),
    ("--config {here}/key.yaml", "unknown flag 'apo.beta'; did you mean apo.beta_r?"),
    ("--config {here}/value.yaml", "value.yaml: argument --apo.beta_r: invalid float value: 'high'"),
    ("--config {here}/tab.yaml", "line 2: found character '\\t'"),
    ("--config {here}/list.yaml", "expected `flag: value` lines"),
    ("--config {here}/switch.yaml", "data.apply_chat_template is a switch: true or false"),
    ("--loss_path {here}/nowhere.py", "No such file"),
    ("--loss_path {here}/loss.py", "cannot import name 'group_los'"),
    ("--loss_path {here}/no_loss.py", "decorate one with @group_loss"),
]
# Of the other commands.
OTHERS = [
    (report, "{here}", "metrics.jsonl does not exist: give the output directory of a run"),
    (report, "", "arguments are required: DIR"),
    (samples, "{here}", "give the output directory of a run"),
    (samples, "{here} --step one", "--step: invalid int value: 'one'"),
    (check_loss, "{here}/nowhere.py", "No such file"),
    (compare, "{here}/nowhere.yaml", "nowhere.yaml"),
    (compare, "{here}/compare.yaml", "output_dir is missing: the folder for runs and results"),
    (evaluate, "{sums} {model} --reward math_verify", "--actor.model_name_or_path"),
    (evaluate, "{model}", "arguments are required: DATA"),
    (evaluate, "{model} {sums} --reward math_verify --samples 0", "--samples 0: must be above 0"),
]


@pytest.fixture(scope="module")
def names(tiny_model, sums, tmp_path_factory) -> dict[str, str]:
    here = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text, encoding="utf-8")
    return {"here": str(here), "model": tiny_model, "sums": sums}


def command(mistake: str, names: dict[str, str]) -> list[str]:
    words = mistake.format(**names).split()
    left_out = {f"-{word}" for word in words if word[1:] in [flag[2:] for flag in COMMAND]}
    given = [part for pair in COMMAND.items() if pair[0] not in left_out for part in pair]
    added = [word for word in words if f"-{word}" not in left_out]
    return [part.format(**names) for part in given] + added


def check(code: int, out: str, err: str, words: str, names: dict[str, str]) -> None:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]  # beside what libraries say
    assert (code, out) == (2, "") and words.format(**names) in line
    assert err.endswith(f"{line}\n") and not any(word in err for word in ("Traceback", "usage:"))


def ended(main, argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stopped:  # argparse's own
        return stopped.code


@pytest.mark.parametrize("mistake, words", MISTAKES, ids=lambda value: value[:40])
def test_a_mistake_is_one_line(mistake, words, names, capsys, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)  # OpenRLHF keeps the stdout of the test that imported it
    code = ended(train_apo_ray.main, [*command(mistake, names), "--dry_run"])
    check(code, *capsys.readouterr(), words, names)


@pytest.mark.parametrize("module, mistake, words", OTHERS, ids=lambda value: str(value)[-40:])
def test_a_mistake_with_another_command_is_one_line(module, mistake, words, names, capsys):
    code = ended(module.main, mistake.format(**names).split())
    check(code, *capsys.readouterr(), words, names)


def test_the_command_without_a_mistake_is_right(names, capsys, monkeypatch):
    monkeypatch.setattr("logging.raiseExceptions", False)
    assert train_apo_ray.main([*command("", names), "--dry_run"]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("mistake, words", [MISTAKES[0], ("--reward {here}/colon.py", "SyntaxError: expected ':'")])
def test_a_mistake_ends_a_real_run(mistake, words, names):
    argv = [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray", *command(mistake, names)]
    result = subprocess.run(argv, capture_output=True, text=True, env=os.environ, timeout=300)
    check(result.returncode, result.stdout, result.stderr, words, names)
