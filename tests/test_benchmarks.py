"""The benchmarks' own sums, and that each script does its work at its smallest size. No seconds are asserted."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf_apo.alpha import CONTROLLERS
from openrlhf_apo.options import resolve

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def load(monkeypatch, tmp_path):
    """A script of benchmarks/ as a module; what it makes goes to a folder of the test's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str):
        module = importlib.import_module(name)
        for each in (module, importlib.import_module("workload")):
            if hasattr(each, "CACHE"):
                monkeypatch.setattr(each, "CACHE", tmp_path)
        return module

    return load


def test_medians_are_of_each_case_and_leave_out_what_is_no_number(load):
    measure = load("measure")
    runs = [{"case": "a", "run": k, "s": s, "steps": [s]} for k, s in enumerate((3.0, 1.0, 2.0))]
    assert measure.medians([*runs, {"case": "b", "run": 0, "s": 7.0}]) == {"a": {"s": 2.0}, "b": {"s": 7.0}}


def test_cases_take_turns(load):
    order = []
    calls = {name: lambda name=name: order.append(name) or {"s": 1.0} for name in ("a", "b")}
    measurements = load("measure").alternated(calls, runs=2)
    assert order == ["a", "b", "a", "b"]
    assert measurements[2] == {"case": "a", "run": 2, "s": 1.0}


def test_a_power_law_has_its_exponent_and_bends_where_the_power_changes(load):
    measure = load("measure")
    sizes = [1, 2, 4, 8, 16]
    assert measure.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert measure.bend(sizes, [5 * size for size in sizes]) is None
    assert measure.bend(sizes, [size if size <= 4 else size**2 / 4 for size in sizes]) == 4


@pytest.mark.parametrize(
    "value, shown", [(0.00123456, "0.00123"), (1.256, "1.26"), (12345.6, "12,346"), (0, "0"), (None, "")]
)
def test_numbers_are_shown_with_three_digits(load, value, shown):
    assert load("measure").number(value) == shown


def test_the_file_says_where_it_was_made_and_keeps_every_measurement(load, tmp_path):
    measure = load("measure")
    measurements = [{"case": "a", "run": 1, "s": 2.0}, {"case": "a", "run": 2, "s": 4.0}]
    path = tmp_path / "sub" / "new.json"
    measure.write_json(path, "mine", measurements, {"a": measure.ratio(3.0, 2.0, "lower")}, fits=1)
    record = json.loads(path.read_text())
    assert record["measurements"] == measurements and record["medians"] == {"a": {"s": 3.0}}
    assert record["ratios"] == {"a": {"value": 1.5, "better": "lower"}} and record["fits"] == 1
    assert record["machine"]["cores"] and record["versions"]["torch"] == torch.__version__


def test_steps_are_measured_after_the_warm_up_and_must_have_the_asked_length(load):
    workload = load("workload")
    work = workload.Work(prompts=2, group=4, response_tokens=8)
    seconds = (9.0, 9.0, 9.0, 1.0, 3.0, 2.0)
    rows = [{"time/step": s, "time/generate": s / 2, "time/update": s / 4, "response_length": 8.0} for s in seconds]
    found = workload.step_medians(rows, work)
    assert found["step_s"] == 2.0 and found["tokens_per_s"] == 2 * 4 * 8 / 2.0 and found["update_s"] == 0.5
    rows[-1]["response_length"] = 7.5
    with pytest.raises(RuntimeError, match="not the same work"):
        workload.step_medians(rows, work)


def test_the_work_has_the_asked_tokens_and_an_end_that_the_model_cannot_say(load, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    workload = load("workload")
    folder, work = workload.make_model("0.92M"), workload.Work(steps=2)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert round(model.num_parameters() / 1e6, 2) == 0.92
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == model.lm_head.out_features
    prompts, reward = workload.write_inputs(tmp_path, work)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert len(texts) == len(set(texts)) == 32
    assert all(len(tokenizer(text)["input_ids"]) == 16 for text in texts)
    scope: dict = {}
    exec(reward.read_text(), scope)
    assert scope["reward_func"](["7 1 77 5"], ["7 1 "], [""])["rewards"].tolist() == [2.0]


@pytest.mark.parametrize(
    "module, arguments, count",
    [
        ("laptop", (["0.92M"], 4), 2),
        ("ray_one_machine", ("0.92M", [1, 4], 4), 6),
        ("async_gain", ("0.92M", 4), 3),
        ("waiting_threads", (4,), 6),
    ],
)
def test_every_run_of_the_trainer_has_flags_that_it_takes(load, monkeypatch, module, arguments, count):
    commands = []
    workload = load("workload")
    monkeypatch.setattr(workload, "observe", lambda command, metrics, work: commands.append((command, work)) or {})
    script = load(module)
    for name, run in script.cases(*arguments).items():
        if " trl " not in name:
            run()
    assert len(commands) == count
    for command, work in commands:
        args = resolve(command[3:])
        assert args.runtime == ("embedded" if module in ("laptop", "waiting_threads") else "ray")
        assert args.train.batch_size * work.updates == work.prompts * work.group


def test_the_laptops_ratios_are_ours_over_the_faster_of_trls(load):
    ours = {"tokens_per_s": 300.0, "first_step_s": 4.0, "pss_gb": 0.5}
    theirs = {"tokens_per_s": 200.0, "first_step_s": 8.0, "pss_gb": 1.0}
    middle = {f"0.92M apo by {by}": ours for by in (16, "default")} | {"0.92M trl by 16": theirs}
    found = load("laptop").ratios(middle | {"0.92M trl by 128": theirs | {"tokens_per_s": 250.0}}, ["0.92M"])
    assert found["0.92M best: tokens_per_s"] == {"value": 1.2, "better": "higher"}
    assert found["0.92M same: tokens_per_s"] == {"value": 1.5, "better": "higher"}
    assert found["0.92M same: first_step_s"] == found["0.92M same: pss_gb"] == {"value": 0.5, "better": "lower"}


def test_trls_environment_is_not_made_again(load, monkeypatch, tmp_path):
    laptop = load("laptop")
    monkeypatch.setattr(laptop, "TRL", tmp_path)
    (tmp_path / "installed").write_text(" ".join([laptop.TORCH, *laptop.PINS]))
    monkeypatch.setattr(laptop.subprocess, "run", lambda *_, **__: pytest.fail("installs"))
    assert laptop.trl_python() == str(tmp_path / "bin" / "python")


def test_the_trl_worker_parses_before_it_imports_trl():
    result = subprocess.run([sys.executable, BENCHMARKS / "trl_worker.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--micro_batch" in result.stdout, result.stderr


@pytest.mark.parametrize("mode", CONTROLLERS)
def test_the_groups_maths_is_timed_off_the_anchor(load, mode):
    maths = load("group_maths")
    found = maths.time_terms(mode, prompts=3, group=4)
    assert found["seconds"] > 0 and (found["prompts"], found["group"]) == (3, 4)
    policy = maths.InstantPolicy(4)
    anchor = policy.log_prob_sums(1)
    policy.left_anchor = True
    assert anchor != policy.log_prob_sums(1)


def test_the_groups_maths_is_fitted_in_the_number_of_answers(load):
    maths = load("group_maths")
    sizes = [(prompts, group) for prompts in (1024, 4096) for group in (8, 64)]
    middle = {maths.name_of("fixed", p, g): {"seconds": 2e-6 * p * g} for p, g in sizes}
    assert maths.fits(middle, ["fixed"], sizes)["fixed"] == {"exponent": pytest.approx(1.0), "bends_at": None}


def test_every_hop_of_the_drivers_data_is_measured(load):
    found = load("driver_data").measure(prompts=2, prompt_tokens=4, length=8)
    assert found["tokens"] == 2 * 8 * 12
    pickled = {key for key in found if key.endswith(": MB")}
    assert len(pickled) == 4 and all(found[key] > 0 for key in pickled)
    assert load("driver_data").driver_alone(found) == pytest.approx(
        sum(found[f"{hop}: s"] for hop in load("driver_data").DRIVER_ALONE)
    )


def test_a_long_run_that_grows_is_seen(load):
    long_run = load("long_run")
    samples = [
        {"rollout": k, "pss_mb": 500 + 0.1 * k, "files": 30, "threads": 8, "processes": 3} for k in range(0, 2000, 10)
    ]
    found = long_run.summary(samples, [{"time/step": 0.1 if k < 1000 else 0.2} for k in range(2000)])
    assert found["pss_mb"]["slope"] == pytest.approx(100 / 520, rel=0.05) and found["pss_mb"]["growth"] > 0.2
    assert found["files"]["growth"] == found["threads"]["slope"] == 0 and found["step_s"]["growth"] == 1.0


def test_the_scaling_fit_is_of_each_axis_and_phase(load):
    scaling = load("scaling")
    axes = {"prompts": [16, 32, 64]}
    middle = {
        scaling.name_of("prompts", size): {"step_s": size, "generate_s": size**0.5, "update_s": size**2}
        for size in (16, 32, 64)
    }
    fits = scaling.fits(middle, axes)["prompts"]
    assert [round(fits[phase]["exponent"], 3) for phase in scaling.PHASES] == [1.0, 0.5, 2.0]
    assert [fits[phase]["bends_at"] for phase in scaling.PHASES] == [None, None, 16]


def tiny_model(**more):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
    return Qwen3ForCausalLM(Qwen3Config(**shape, **heads, **more))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_upstreams_computation_is_the_actors(load, temperature):
    from openrlhf_apo.ranks.deepspeed.backend import Actor

    model = tiny_model()
    actor = Actor(model, temperature=temperature)
    actor.packing_samples = False  # which Actor sets only for a model that it loads itself
    sequences = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(1))
    attention_mask = (torch.arange(12) < torch.tensor([12, 10, 7])[:, None]).long()
    action_mask = attention_mask[:, 1:] * (torch.arange(1, 12) >= 4)

    def gradients(log_probs):
        model.zero_grad()
        log_probs.square().sum().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    theirs = actor(sequences, action_mask, attention_mask)
    expected = gradients(theirs)
    mine = load("upstream_actor").upstream_log_probs(model, sequences, attention_mask, action_mask, temperature)
    assert torch.equal(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(gradients(mine), expected, strict=True))


def test_the_model_flops_are_those_of_its_matrices(load):
    step = load("gpu_policy_step")
    batch = step.Batch(samples=2, prompt=3, response=5)
    model = step.make_model(step.SMALL, "cpu", torch.float32)
    matrices = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    pairs = sum(range(1, 9)) * 2
    attention = 12 * step.SMALL.layers * step.SMALL.heads * step.SMALL.head_dim * pairs
    head = 6 * step.SMALL.vocabulary * step.SMALL.hidden * 10
    assert step.model_flops(step.SMALL, batch) == 6 * matrices * 16 + head + attention


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_a_cards_peak_is_found_by_its_name(load, name, flops):
    assert load("gpu_policy_step").peaks_of(name)[0] == flops
    assert load("gpu_policy_step").peaks_of("some other card") is None


IMPORTS = """
import runpy, sys
sys.argv = {argv!r}
sys.path.insert(0, {folder!r})
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert not {{"openrlhf", "ray", "deepspeed", "vllm"}} & sys.modules.keys()
"""


def test_the_gpu_step_runs_without_openrlhf(tmp_path):
    sizes = ["--samples", "2", "--prompt_tokens", "3", "--response_tokens", "5", "--repeats", "1", "--runs", "1"]
    argv = [str(BENCHMARKS / "gpu_policy_step.py"), "--cpu", *sizes, "--json", str(tmp_path / "step.json")]
    code = IMPORTS.format(argv=argv, folder=str(BENCHMARKS))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["tokens"] == 16 and set(record["ratios"]) == {
        "checkpointing on: seconds",
        "checkpointing off: seconds",
    }


@pytest.mark.parametrize("who", ["openrlhf", "apo"])
def test_a_passes_memory_is_that_of_a_fresh_process(load, who):
    found = load("policy_memory").measure(who, 4, 512, 8)
    assert found["peak_gb"] >= 0 and found["seconds"] > 0


def write(path: Path, ratios: dict, benchmark: str = "laptop") -> str:
    entries = {name: {"value": value, "better": better} for name, (value, better) in ratios.items()}
    path.write_text(json.dumps({"benchmark": benchmark, "ratios": entries}))
    return str(path)


def test_a_ratio_that_got_worse_is_named_and_fails(load, tmp_path, capsys):
    main = load("compare_baselines").main
    kept = tmp_path / "baselines.json"
    kept.write_text("{}")
    flags = ["--baselines", str(kept)]
    old = write(tmp_path / "old.json", {"speed": (1.3, "higher"), "memory": (0.5, "lower"), "launch": (0.5, "lower")})
    assert main([old, *flags]) == 2 and "--update" in capsys.readouterr().err
    assert main([old, *flags, "--update"]) == 0
    assert main([old, *flags]) == 0
    capsys.readouterr()
    new = write(tmp_path / "new.json", {"speed": (1.1, "higher"), "memory": (0.53, "lower"), "other": (1.0, "lower")})
    assert main([new, *flags]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "worse" in line] == ["laptop: speed: 1.3 -> 1.1: worse, -15%"]
    assert main([new, *flags, "--tolerance", "0.2"]) == 0
    assert main([write(tmp_path / "no.json", {}, benchmark="nobody's"), *flags]) == 2
    (tmp_path / "text.json").write_text("not JSON")
    assert main([str(tmp_path / "text.json"), *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_kept_baselines_are_ratios():
    kept = json.loads((BENCHMARKS / "baselines.json").read_text(encoding="utf-8"))
    for benchmark, ratios in kept.items():
        assert (BENCHMARKS / f"{benchmark}.py").exists()
        for entry in ratios.values():
            assert entry["value"] > 0 and entry["better"] in ("higher", "lower")


def test_shared_prompts_are_timed_on_answers_to_common_prompts(load, monkeypatch):
    shared, workload = load("shared_prompts"), load("workload")
    monkeypatch.setitem(workload.SIZES, "0.92M", workload.Size(vocabulary=96, hidden=16, layers=2))
    work = workload.Work(prompts=2, group=3, prompt_tokens=4, response_tokens=5)
    sequences, action_mask = shared.samples(work)
    assert sequences.shape == (6, 9) and action_mask.sum(-1).tolist() == [5] * 6
    assert len(sequences[:, :4].unique(dim=0)) == 2 and (sequences[0, :4] == sequences[2, :4]).all()
    assert [shared.spared(work, count) for count in (2, 3, 4, 6)] == [4, 8, 8, 16]
    for share in (False, True):
        assert shared.timed_pass(tiny_model(), work, 4, share)["pass_s"] > 0
