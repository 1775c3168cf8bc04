"""cli.evaluate: its estimator and intervals by hand, and its score against the run that made the model."""

import io
import itertools
import json
import statistics
from math import comb
from pathlib import Path

import pytest
import torch
import yaml
from test_embedded import run
from tqdm import tqdm

from openrlhf_apo.analysis.scores import interval, pass_at_k, powers_up_to, scores
from openrlhf_apo.cli.evaluate import FROM_FILES, main
from openrlhf_apo.embedded.evaluate import _advances
from openrlhf_apo.options import resolve
from openrlhf_apo.options.resolve import flatten

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST_DIGIT = """
def reward_func(queries, prompts, labels, **kwargs):
    return {"rewards": [float(query[len(prompt):][:1].isdigit()) for query, prompt in zip(queries, prompts)]}
"""


@pytest.mark.parametrize("rewards", [[0, 1, 1, 0, 0, 1], [1, 1], [0], [0.5, -1.0, 2.0, 0.5, 0.0]], ids=str)
def test_pass_at_k_is_the_mean_of_the_best_over_all_subsets(rewards):
    for k in range(1, len(rewards) + 1):
        best = [max(subset) for subset in itertools.combinations(rewards, k)]
        assert pass_at_k(rewards, k) == pytest.approx(statistics.fmean(best), abs=1e-12)


@pytest.mark.parametrize("n, c", [(8, 0), (8, 1), (8, 5), (8, 8), (200, 3)])
def test_pass_at_k_of_right_and_wrong_answers_is_equation_1(n, c):
    for k in powers_up_to(n):
        assert pass_at_k([1.0] * c + [0.0] * (n - c), k) == pytest.approx(1 - comb(n - c, k) / comb(n, k), abs=1e-12)


def test_which_k_are_told():
    assert powers_up_to(1) == [1]
    assert powers_up_to(8) == [1, 2, 4, 8]
    assert powers_up_to(12) == [1, 2, 4, 8, 12]


def test_wilsons_interval_solves_its_equation():
    """(mean - p)^2 = z^2 p (1 - p) / n at both ends."""
    for n, right in ((10, 3), (50, 50), (7, 0)):
        low, high, method = interval([1.0] * right + [0.0] * (n - right))
        assert method == "wilson" and 0 <= low < high <= 1
        for p in (low, high):
            assert (right / n - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)


def test_the_bootstrap_is_near_the_normal_interval_of_many_values_and_the_same_each_time():
    values = [i / 400 for i in range(401)]
    low, high, method = interval(values)
    half = 1.96 * statistics.stdev(values) / 401**0.5
    assert method == "bootstrap" and interval(values) == (low, high, method)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.005)


def test_scores_come_by_data_source_where_there_are_several():
    found = scores("greedy", [1.0, 0.0, 1.0], ["b", "a", "b"])
    assert [(s.datasource, s.prompts, s.mean) for s in found] == [
        ("all", 3, pytest.approx(2 / 3)),
        ("a", 1, 0.0),
        ("b", 2, 1.0),
    ]
    assert [s.datasource for s in scores("greedy", [1.0], ["a"])] == ["all"]


LENGTHS = ("--data.max_len", "48", "--rollout.max_new_tokens", "12")


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run that learns to begin with a digit: its folder, its last line, its held-out data, its reward."""
    folder = tmp_path_factory.mktemp("trained")
    reward, data = folder / "first_digit.py", folder / "held_out.jsonl"
    reward.write_text(FIRST_DIGIT)
    rows = [
        {"prompt": f"{i}+1=", "label": str(i + 1), "datasource": "even" if i % 2 == 0 else "odd"} for i in range(9)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [
        "--reward.remote_url",
        str(reward),
        "--eval.dataset",
        str(data),
        "--eval.temperature",
        "0",
        "--eval.ends",
    ]
    lines = run(flags, folder / "run", *held_out, "--actor.adam.lr", "1e-2")
    return folder / "run", lines, data, reward


def test_the_progress_bar_leaves_the_model_alone():
    model, batch = torch.nn.Linear(2, 1), torch.ones(1, 2)
    bar = tqdm(total=3, file=io.StringIO(), mininterval=0)
    before = model(batch)
    model.register_forward_hook(_advances(bar))
    assert all(torch.equal(model(batch), before) for _ in range(3)) and bar.n == 3


def evaluated(trained, tmp_path, *more):
    folder, _, data, reward = trained
    out = tmp_path / "scores.json"
    assert main([str(folder), str(data), "--reward", str(reward), *LENGTHS, "--json", str(out), *more]) == 0
    return json.loads(out.read_text())["scores"]


def test_the_greedy_score_is_that_of_the_run_that_made_the_model(trained, tmp_path):
    lines = trained[1]
    first, last = (lines[i]["eval/pass1"] for i in (0, -1))
    found = {score["datasource"]: score for score in evaluated(trained, tmp_path)}
    assert found["all"]["mean"] == last != first
    assert {source: found[source]["mean"] for source in ("even", "odd")} == {
        source: lines[-1][f"eval/{source}/pass1"] for source in ("even", "odd")
    }
    assert [found[source]["prompts"] for source in ("all", "even", "odd")] == [9, 5, 4]


def test_samples_give_pass_at_k_and_limit_cuts(trained, tmp_path, capsys):
    found = evaluated(trained, tmp_path, "--samples", "4", "--limit", "3")
    names = [score["name"] for score in found if score["datasource"] == "all"]
    assert names == ["greedy", "pass@1", "pass@2", "pass@4"]
    means = [score["mean"] for score in found if score["datasource"] == "all"][1:]
    assert means == sorted(means) and {score["prompts"] for score in found if score["datasource"] == "all"} == {3}
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split() == ["data", "source", "prompts", "mean", "95", "%", "interval"]
    assert "4 samples: 100%" in captured.err


def test_the_best_of_all_samples_is_what_the_trainer_measures(flags, trained, tmp_path):
    _, _, data, reward = trained
    held_out = ["--eval.dataset", str(data), "--eval.n_samples_per_prompt", "4", "--eval.temperature", "0.7"]
    short = ["--reward.remote_url", str(reward), "--data.max_samples", "8", "--eval.ends"]
    last = run(flags, tmp_path / "run", *held_out, *short)[-1]
    samples = ["--samples", "4", "--temperature", "0.7", "--limit", "8"]
    found = evaluated((tmp_path / "run", None, data, reward), tmp_path, *samples)
    means = {score["name"]: score["mean"] for score in found if score["datasource"] == "all"}
    assert 0 < means["pass@1"] < means["pass@4"]
    assert (means["pass@1"], means["pass@4"]) == pytest.approx((last["eval/pass1"], last["eval/pass4"]), abs=1e-12)


def test_of_a_runs_file_what_is_about_answers_is_taken(trained, tmp_path):
    reward = trained[3]
    (tmp_path / "run.yaml").write_text(
        f"reward: {reward}\ndata.max_len: 48\nrollout.max_new_tokens: 12\ndata.max_samples: 2\nds.zero_stage: 3\n"
        "vllm.num_engines: 4\nds.param_dtype: bf16\nloss: g2rpo_a\nrollout.batch_size: 64\nloss_path: gone.py\n"
        "train.async_enable: true\nds.packing_samples: true\neval.steps: 1\neval.dataset: gone.jsonl\n"
    )
    folder, _, data, _ = trained
    out = tmp_path / "scores.json"
    assert main([str(folder), str(data), "--config", str(tmp_path / "run.yaml"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["scores"] == evaluated(trained, tmp_path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml")), ids=str)
def test_every_runs_file_can_be_given(path):
    if path.parent.name not in ("compare", "evidence"):
        words = ["--runtime", "embedded", "--actor.model_name_or_path", "m", "--data.prompt_dataset", "d"]
        words += ["--rollout.batch_size", "1", "--train.batch_size", "8", "--config", str(path)]
        given = flatten(yaml.safe_load(path.read_text()))
        scored = {"reward", "reward.name", "reward.remote_url", "train.agent_func_path"} & given.keys()
        words += [] if scored else ["--reward", "math_verify"]
        resolve(words, check_model_folder=False, from_files=FROM_FILES)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--temperature", "0.5"], "--temperature has no effect without --samples"),
        (["--samples", "0"], "--samples 0: must be above 0"),
        (["--limit", "-1"], "--limit -1: must be above 0"),
        (["--json", "no/such/folder/file.json"], "no such folder"),
        (["--reward", "nothing"], "no such reward"),
        (["--reward", "no_file.py"], "no such file"),
        (["--data.label_key", "gold"], "has no column 'gold'"),
        (["--data.max_length", "3"], "did you mean --data.max_len?"),
        (["--data.apply_chat_template"], "has no chat template"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line(trained, capsys, words, complaint):
    folder, _, data, _ = trained
    assert main([str(folder), str(data), "--reward", "math_verify", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")


def test_flags_before_the_model_are_refused(capsys):
    for words in (["--reward", "math_verify", "model", "data"], ["model", "--reward", "math_verify", "data"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "error: MODEL and DATA come first" in capsys.readouterr().err


def test_a_missing_model_or_data_set_is_one_line(trained, tmp_path, capsys):
    folder, _, data, reward = trained
    for words in ([str(tmp_path / "gone"), str(data)], [str(folder), str(tmp_path / "gone.jsonl")]):
        assert main([*words, "--reward", str(reward)]) == 2
        assert "gone" in capsys.readouterr().err.splitlines()[-1]
