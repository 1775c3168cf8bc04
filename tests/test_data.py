"""Data preparation: what is read from real files, what the tiny model starts from, and what is said when it cannot."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openrlhf_apo.data import math_prompts, tiny, warm_model
from openrlhf_apo.data.files import read_jsonl, write_jsonl
from openrlhf_apo.data.math_prompts import (
    INSTRUCTION,
    boxed_answer,
    load_math_rows,
    solution_before_answer,
    split_rows,
    to_prompt_rows,
)

DATA = Path(os.environ.get("APO_DATA_DIR", Path(__file__).parents[1] / "../shared/data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data in {DATA}; set APO_DATA_DIR")

MATH_ROW = {
    "problem": "Two plus two?",
    "level": "Level 3",
    "solution": r"It is $\boxed{5}$, no, $\boxed{\frac{8}{2}}$.",
}
GSM8K_ROW = {"question": "How many?", "answer": "Each has 600 pears. They have <<600*2=1200>>1200.\n#### 1,200"}
SVAMP_ROW = {"question": "6 less 2?", "answer": "4", "solution": "( 6.0 - 2.0 )"}


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# --- math_prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x : x > 0 \right.}", r"\left\{ x : x > 0 \right."),
        (r"equal to $\boxed 9$.", "9"),
        (r"cut short \boxed{12", None),
        ("no box", None),
    ],
)
def test_boxed_answer(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    "row, question, label, solution",
    [
        (MATH_ROW, "Two plus two?", r"\frac{8}{2}", ""),
        (GSM8K_ROW, "How many?", "1200", "Each has 600 pears."),
        (SVAMP_ROW, "6 less 2?", "4", ""),
    ],
)
def test_prompt_rows_of_the_three_data_sets(row, question, label, solution):
    expected = {"prompt": question + INSTRUCTION, "label": label, "datasource": "d", "solution": solution}
    assert to_prompt_rows([row], "d") == [expected]


@pytest.mark.parametrize(
    "text, label, shown",
    [
        (r"We double. So it is $\boxed{4}$, as said.", "4", "We double."),
        (r"It is 4, that is. Four again: $\boxed{4}$.", "4", ""),
        ("Take 14 <<10+4=14>>first.\nThen 1,200 in all.\n#### 1200", "1200", "Take 14 first."),
        ("no answer mark at all", "4", ""),
    ],
)
def test_a_solution_is_kept_up_to_its_answer(text, label, shown):
    assert solution_before_answer({"solution": text}, label) == shown


def test_named_columns_win():
    row = {"text": "Q", "gold": "7", "question": "not this", "answer": "nor this"}
    assert to_prompt_rows([row], "d", "text", "gold", "")[0] == {
        "prompt": "Q",
        "label": "7",
        "datasource": "d",
        "solution": "",
    }


def test_repeated_prompts_and_missing_answers_are_left_out_and_counted(caplog):
    unanswered = {"problem": "Why?", "solution": "Nobody knows."}
    assert len(to_prompt_rows([MATH_ROW, MATH_ROW, unanswered], "d")) == 1
    assert "left out 2 rows" in caplog.text


@pytest.mark.parametrize("levels", [["Level 3", "Level 5", "Level ?"], [3, 5, None]])
def test_level(tmp_path, levels):
    write_jsonl(tmp_path / "math.jsonl", [MATH_ROW | {"level": level} for level in levels])
    assert [row["level"] for row in load_math_rows(tmp_path / "math.jsonl", level=3)] == levels[:1]
    with pytest.raises(ValueError, match="no rows at level 4 .* levels are 3, 5"):
        load_math_rows(tmp_path / "math.jsonl", level=4)


def test_a_hub_data_set_made_of_subjects_is_read_whole(tmp_path):
    for subject in ("algebra", "geometry"):
        write_jsonl(tmp_path / subject / "train.jsonl", [MATH_ROW | {"problem": subject}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: algebra\n  data_files: algebra/train.jsonl\n"
        "- config_name: geometry\n  data_files: geometry/train.jsonl\n---\n"
    )
    assert [row["problem"] for row in load_math_rows(tmp_path, level=3)] == ["algebra", "geometry"]
    with pytest.raises(ValueError, match="cannot load .* Unknown split"):
        load_math_rows(tmp_path, split="test")


def test_split_is_seeded_and_disjoint():
    rows = [{"prompt": str(i)} for i in range(20)]
    train, held_out = split_rows(rows, 5, seed=1)
    assert (train, held_out) == split_rows(rows, 5, seed=1) != split_rows(rows, 5, seed=2)
    assert sorted(train + held_out, key=rows.index) == rows and len(held_out) == 5


def test_command_writes_the_files_and_no_stale_eval(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [MATH_ROW | {"problem": str(i)} for i in range(10)])
    arguments = ["--dataset", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--eval_size"]
    math_prompts.main([*arguments, "3"])
    assert len(read_jsonl(tmp_path / "out/train.jsonl")) == 7
    assert len(read_jsonl(tmp_path / "out/eval.jsonl")) == 3
    math_prompts.main([*arguments, "0"])
    assert len(read_jsonl(tmp_path / "out/train.jsonl")) == 10
    assert not (tmp_path / "out/eval.jsonl").exists()


@pytest.mark.parametrize(
    "text, flags, message",
    [
        (None, [], "no such file"),
        ("", [], "no rows in"),
        ("{\n", [], "line 1: not JSON"),
        ("[1]\n", [], "line 1: not a JSON object"),
        ('{"text": "?", "answer": "4"}\n', [], "no such column .* columns are text, answer; pass --input_key"),
        ('{"question": "?", "gold": "4"}\n', [], "no such column .* pass --label_key"),
        ('{"question": "?", "answer": "4"}\n', ["--input_key", "q"], "no such column q; columns are question, answer"),
        ('{"question": "?", "answer": "4"}\n', ["--level", "3"], "no column level"),
        ('{"question": "?", "answer": "4"}\n', ["--eval_size", "1"], "--eval_size is 1 and there are 1 rows"),
        ('{"question": "?", "solution": "no idea"}\n', [], "no answer found in column solution"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, text, flags, message):
    if text is not None:
        (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        math_prompts.main(
            ["--dataset", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out"), "--eval_size", "0", *flags]
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^cannot load nobody/nothing: [^\n]* \(a local file must end in \.jsonl\)$"):
        load_math_rows("nobody/nothing")


@needs_data
@pytest.mark.parametrize(
    "name, level, rows",
    [
        ("math_level3_train", 3, 1586),
        ("math_level3_test", 3, 1127),
        ("gsm8k_train", None, 7473),
        ("gsm8k_test", None, 1319),
        ("svamp", None, 999),
    ],
)
def test_real_files_lose_no_row(name, level, rows):
    loaded = load_math_rows(DATA / f"{name}.jsonl", level)
    prompts = to_prompt_rows(loaded, name)
    assert len(prompts) == rows
    assert [row["label"] for row in prompts] == [row["answer"] for row in loaded]


@needs_data
@pytest.mark.parametrize("name", ["math_level3_train", "math_level3_test", "gsm8k_test"])
def test_answers_read_from_real_solutions_are_the_files_own(name):
    loaded = load_math_rows(DATA / f"{name}.jsonl")
    prompts = to_prompt_rows(loaded, name, label_key="solution")
    assert [row["label"] for row in prompts] == [row["answer"] for row in loaded]


# --- tiny and warm_model ---------------------------------------------------------------------------------------------


def test_arithmetic_is_right_and_no_fact_is_shared():
    train, held_out = tiny.arithmetic_rows(3000, 500, seed=3)
    facts = []
    for rows in (train, held_out):
        found = set()
        for row in rows:
            a, op, b, answer = re.fullmatch(r"(\d+)([+*-])(\d+)=\\boxed{(\d+)}", row["completion"]).groups()
            assert str(eval(a + op + b)) == answer == row["label"]
            assert re.findall(r"\d+", row["prompt"]) == [a, b]
            found.add((op, *sorted((int(a), int(b)))))
        facts.append(found)
    assert facts[0].isdisjoint(facts[1]) and len(facts[1]) > 50


def two_steps(folder, seed):
    return tiny.build_tiny(folder, replace(tiny.arithmetic(seed), steps=2), seed)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return two_steps(tmp_path_factory.mktemp("tiny"), seed=5)


def test_the_same_seed_builds_the_same_bytes(built, tmp_path):
    two_steps(tmp_path / "same", seed=5)
    assert content(tmp_path / "same") == content(built.model.parent)
    two_steps(tmp_path / "other", seed=6)
    assert not set(content(tmp_path / "other").items()) & {
        (name, data) for name, data in content(built.model.parent).items() if name.endswith(("jsonl", "safetensors"))
    }


def test_text_comes_back_exactly_and_is_short(built):
    from transformers import AutoTokenizer

    from openrlhf_apo.data.warmup import EOS, chat_prompt

    tokenizer = AutoTokenizer.from_pretrained(built.model)
    rows, _ = tiny.arithmetic_rows(500, 0, seed=5)
    for row in rows:
        prompt, completion = chat_prompt(tokenizer, row["prompt"]), row["completion"] + EOS
        assert len(tokenizer(prompt).input_ids) <= 24 and len(tokenizer(completion).input_ids) <= 14
        assert tokenizer.decode(tokenizer(prompt + completion).input_ids) == prompt + completion
        assert tokenizer.decode(tokenizer(completion).input_ids, skip_special_tokens=True) == row["completion"]
        assert all(len(re.sub(r"\D", "", token)) <= 1 for token in tokenizer.tokenize(completion))
    anything = "  Zażółć 1,234.50 € \n\n\t$\\frac{1}{2}$ 漢字 \x01 don't"
    assert tokenizer.decode(tokenizer(anything).input_ids) == anything


def test_the_folder_loads_as_any_other_and_stops_at_its_eos(built):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(built.model)
    model = AutoModelForCausalLM.from_pretrained(built.model)
    assert model.config.head_dim == 32 and not model.config.tie_word_embeddings and model.dtype == torch.float32
    assert tokenizer.decode([model.generation_config.eos_token_id]) == tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is 1 + 2?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>What is 1 + 2?<|im_end|><|assistant|>"
    assert len(tokenizer.tokenize(text)) - len(tokenizer.tokenize("What is 1 + 2?")) == 3


def test_a_finished_folder_is_left_alone_and_a_torn_one_made_anew(built, tmp_path, caplog):
    caplog.set_level("INFO")
    whole = content(built.model.parent)

    def again(steps=2):
        caplog.clear()
        tiny.build_tiny(built.model.parent, replace(tiny.arithmetic(5), steps=steps), 5)
        return "up to date" not in caplog.text

    assert not again()
    for torn in ("model/model.safetensors", "train.jsonl", "done.json"):
        path = built.model.parent / torn
        path.write_bytes(path.read_bytes()[:-100])
        assert again()
        assert content(built.model.parent) == whole
    built.eval.unlink()
    assert again() and content(built.model.parent) == whole
    assert again(steps=3) and again()


def test_warm_up_teaches_and_stops_at_its_target():
    from openrlhf_apo.data.warmup import build_model, build_tokenizer, warm_up

    rows = [{"prompt": f"What is {a}?", "completion": f"\\boxed{{{a}}}"} for a in range(10)]
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in rows], 300)
    model = build_model(tokenizer, hidden=64, layers=1, seed=0)
    assert warm_up(model, tokenizer, rows, steps=20, target=0.5) < 0.1
    assert 0.5 <= warm_up(model, tokenizer, rows, steps=300, target=0.5) < 0.6


def test_equations_become_completions():
    row = SVAMP_ROW | {"solution": "( ( 10.0 + 2.5 ) * 2.0 )", "answer": "25"}
    assert warm_model.equation_rows([row], "d") == [
        {
            "prompt": "6 less 2?",
            "label": "25",
            "datasource": "d",
            "solution": "",
            "completion": "((10+2.5)*2)=\\boxed{25}",
        }
    ]
    with pytest.raises(ValueError, match="needs an equation"):
        warm_model.equation_rows([SVAMP_ROW | {"solution": "Take two away."}], "d")


def test_warm_model_says_what_is_wrong_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        warm_model.main(["--dataset", str(tmp_path / "none.jsonl"), "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "no such file" in error and error.count("\n") == 1


@needs_data
def test_svamp_is_split_and_warmed(tmp_path):
    warm_model.main(["--dataset", str(DATA / "svamp.jsonl"), "--out", str(tmp_path), "--steps", "1"])
    train, held_out = read_jsonl(tmp_path / "train.jsonl"), read_jsonl(tmp_path / "eval.jsonl")
    assert (len(train), len(held_out)) == (799, 200)
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held_out)
    assert set(train[0]) == {"prompt", "label", "datasource"}
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "qwen3"


def test_muon_is_torchs_but_for_its_bfloat16():
    from openrlhf_apo.data.muon import Muon, orthogonalised

    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8))]
    ours, theirs = ([w.clone().requires_grad_() for w in start] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.01}
    optimizers = (Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings))
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn(a.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    for a, b, w in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - w).norm()
    singular = torch.linalg.svdvals(orthogonalised(start[0]))
    assert 0.6 < singular.min() and singular.max() < 1.3
