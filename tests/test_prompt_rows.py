"""Labels of a data set: what a reward needs is there in every row, or the row is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_apo.data.blended_rows import read_blended_rows
from openrlhf_apo.data.prompt_rows import load_prompts
from openrlhf_apo.errors import DataError
from openrlhf_apo.rewards.reward import Answer
from openrlhf_apo.rewards.verifier import MathVerifyReward

pytestmark = pytest.mark.filterwarnings("ignore")
NOTHING = object()


def labels(tmp_path: Path, given: list, **how) -> list:
    """The labels of rows that are written with those given, as the reward gets them."""
    rows = [{"prompt": "1+1="} | ({} if label is NOTHING else {"answer": label}) for label in given]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SimpleNamespace(input_key="prompt", input_template=None, max_samples=100, max_len=64)
    loaded = load_prompts(
        SimpleNamespace(data=data, use_ms=False),
        lambda text, add_special_tokens: {"input_ids": list(text)},
        str(tmp_path / "rows.jsonl"),
        split="train",
        seed=1,
        label_key="answer",
        prompt_limit=16,
        **{"label_optional": False} | how,
    )
    return [row.label for row in loaded]


@pytest.mark.parametrize("label", [NOTHING, None, "", "  "], ids=["missing", "null", "empty", "blank"])
@pytest.mark.parametrize("others", [["2", "3"], [2, 3], ["2", 3]], ids=["text", "numbers", "mixed"])
@pytest.mark.parametrize("check", [MathVerifyReward(1.0).check_label, lambda label: None], ids=["math_verify", "own"])
def test_a_row_without_a_label_is_refused_by_its_number(tmp_path, label, others, check):
    with pytest.raises(DataError, match=r"^row 3 of '.*rows.jsonl' has no label: fill in its 'answer' \(--data.label"):
        labels(tmp_path, [*others, label], check_label=check)


def test_a_label_that_nobody_asked_for_may_be_missing(tmp_path):
    assert labels(tmp_path, ["2", NOTHING], label_optional=True) == ["2", None]


@pytest.mark.parametrize("label", [[1, 2], {"sum": 3}, True])
def test_math_verify_refuses_what_is_neither_text_nor_a_number(tmp_path, label):
    with pytest.raises(DataError, match="row 2 of .*: --reward math_verify needs an answer as label"):
        labels(tmp_path, ["2", label], check_label=MathVerifyReward(1.0).check_label)


def test_numbers_are_text_to_math_verify(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "openrlhf_apo.rewards.verifier.grade_many", lambda texts, golds, timeout: seen.extend(golds) or []
    )
    found = labels(tmp_path, [3, 0, "7"], check_label=MathVerifyReward(1.0).check_label)
    MathVerifyReward(1.0)([Answer("", "", label) for label in found], 0)
    assert seen == ["3", "0", "7"]


def test_a_reward_of_your_own_gets_labels_as_the_data_has_them(tmp_path):
    assert labels(tmp_path, [{"sum": 3}, {"sum": 4}]) == [{"sum": 3}, {"sum": 4}]


@pytest.mark.parametrize("bad, reason", [('{"prompt": "1', "not JSON"), ("[1]", "not a JSON object")])
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, reason):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1="}\n' * 40 + bad + "\n")
    with pytest.raises(DataError, match=f"cannot be read: .*rows.jsonl, line 41: {reason}"):
        read_blended_rows(
            str(tmp_path / "rows.jsonl"), None, SimpleNamespace(is_rank_0=lambda: False, print=print), 1, 100, "train"
        )
