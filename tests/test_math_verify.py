"""The verifier: answers graded right, hostile ones within their time, and by OpenRLHF's convention."""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from openrlhf_apo.rewards import math_verify as reward
from openrlhf_apo.rewards.math_verify import grade_many, reward_func

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("APO_DATA_DIR", ROOT.parent / "shared" / "data"))
REWARD_FILE = ROOT / "openrlhf_apo" / "rewards" / "math_verify.py"


def score_many(completions, golds, *mode, timeout=5.0) -> list[float]:
    return [grade.score for grade in grade_many(completions, golds, *mode, timeout=timeout)]


def rows(name):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent: set APO_DATA_DIR")
    return [json.loads(line) for line in (DATA / name).open()]


# ---- grading ----


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18"),
        ("18", "18."),
        ("18", "18.0"),
        ("18", r"\$18.00"),
        ("18", r"18\text{ dollars}"),
        ("18", "x = 18"),
        ("1000", "1,000"),
        (r"18,\!107", "18107"),
        ("35", r"35.0\%"),
        (r"50\%", "50.0"),
        (r"20\%", "0.2"),
        (r"\frac{3}{4}", "0.75"),
        (r"\frac{3}{4}", r"\dfrac34"),
        (r"\tfrac 94", "9/4"),
        (r"\sqrt{2}+1", r"1 + \sqrt{2}"),
        ("3i,-3i", "-3i, 3i"),
        (r"(-5,-2] \cup (-1,3]", r"(-5,-2]\cup(-1,3]"),
        (r"\begin{pmatrix} 3 \\ 1 \end{pmatrix}", r"\begin{pmatrix}3\\1\end{pmatrix}"),
        (r"\text{even}", "even"),
        (r"\text{(A)}", "A"),
        (r"150^\circ", "150"),
        (r"7\text{ hours}.", "7"),
        (r"\left\{1, 2\right\}", r"\{2, 1\}"),
        ("ABC", "ABC."),
        ("101_2", "101_{2}"),
        ("101_2", "101"),
        ("xyz", "yxz"),
    ],
)
def test_equal_answers(gold, answer):
    assert score_many([rf"So it is $\boxed{{{answer}}}$."], [gold], timeout=20) == [1.0]


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "81"),
        ("18", "-18"),
        ("18", "18.00001"),
        ("18", "17, 18"),
        ("18", r"17 \text{ or } 18"),
        ("18", ""),
        ("18", "{}"),
        (r"\frac{1}{3}", "0.3333"),
        ("(0,5)", "(5,0)"),
        ("12345678901234567890", "12345678901234567891"),
        (r"\text{even}", "odd"),
        ("ABC", "BAC"),
        ("101_2", "101_3"),
        ("1234_{6}", "1234_5"),
    ],
)
def test_different_answers(gold, answer):
    assert score_many([rf"So it is $\boxed{{{answer}}}$."], [gold], timeout=20) == [0.0]


@pytest.mark.parametrize(
    ("strict", "text"),
    [
        (1.0, r"First $\boxed{41}$. No: $\boxed{42}$, from 43 - 1."),
        (0.0, r"First $\boxed{42}$. No: $\boxed{41}$, from 42 - 1."),
        (1.0, r"\boxed{\boxed{42}}"),
        (1.0, r"\boxed{\frac{84}{2}} {"),
        (0.0, r"\boxed{42} and then \boxed{42"),
        (0.0, "#### 42"),
        (0.0, "The answer is 42"),
        (0.0, "$42$"),
        (0.0, ""),
    ],
)
def test_strict_reads_the_last_box_only(strict, text):
    assert score_many([text], ["42"], timeout=20) == [strict]


@pytest.mark.parametrize(
    "text",
    [
        "#### 42",
        "The answer must be positive, so x > 3.\n#### 42",
        "The answer is 42",
        "the answer is $42$.",
        "Final Answer: the final answer is 42<|im_end|>",
        "so 6*7",
        "x = 84/2",
        r"Hence $\frac{84}{2}$",
        "It costs $42.<|im_end|>\n",
        "A: 42",
        "It makes 42.0%.",
        r"41, no, \boxed{42}, not 43",
    ],
)
def test_lenient_reads_what_there_is(text):
    assert score_many([text], ["42"], "lenient", timeout=20) == [1.0]
    assert score_many([text], ["24"], "lenient", timeout=20) == [0.0]


def test_real_completions_agree_with_their_labels():
    cases = rows("verifier_cases.jsonl")
    completions, golds = [case["completion"] for case in cases], [case["gold"] for case in cases]
    labels = [float(case["label"] == "correct") for case in cases]

    lenient = grade_many(completions, golds, "lenient", timeout=20)
    agree = sum(grade.score == label for grade, label in zip(lenient, labels, strict=True))
    assert agree >= 0.993 * len(cases)
    assert {grade.outcome for grade in lenient} == {"ok"}

    strict = score_many(completions, golds, "strict", timeout=20)
    boxed = [case["final_format"] == "boxed" for case in cases]
    assert not any(score for score, box in zip(strict, boxed, strict=True) if not box)
    wrong = sum(score != label for score, label, box in zip(strict, labels, boxed, strict=True) if box)
    assert wrong <= 0.007 * sum(boxed)


def test_latex_golds_equal_their_own_solutions_and_not_others():
    problems = [row for row in rows("math_level3_test.jsonl") if not row["answer"].lstrip("-").isdigit()][::3]
    golds = [row["answer"] for row in problems]
    solutions = [row["solution"] for row in problems]
    assert sum(score_many(solutions, golds, timeout=20)) >= 0.99 * len(golds)
    paid = score_many(solutions, golds[1:] + golds[:1], timeout=20)
    same = [a == b for a, b in zip(golds, golds[1:] + golds[:1], strict=True)]
    assert paid == [float(s) for s in same]


# ---- hostile answers ----

HOSTILE = {
    "factorial": "99999999!",
    "tower": "10^{10^{10}}",
    "digits": "7" * 10_000,
    "nested fractions": r"\frac{1}{" * 500 + "2" + "}" * 500,
    "open brackets": "(" * 10_000,
    "open boxes": r"\boxed{" * 2_000,
    "control characters": "".join(map(chr, range(32))),
    "NUL": "\0" * 100,
    "lone surrogates": "\ud800\udfff",
    "backslashes": "\\" * 20_000,
    "huge": "x + " * 500_000,
    "dollars": "$" * 20_000,
    "many answers": "answer " * 3_000,
}


def test_hostile_answers_score_0_within_the_limit_and_leave_the_verifier_sound():
    texts = [rf"\boxed{{{text}}}" for text in HOSTILE.values()]
    score_many(["warm up"], ["18"])
    start = time.monotonic()
    grades = grade_many(texts, ["18"] * len(texts), timeout=1.0, workers=2)
    took = time.monotonic() - start
    assert [grade.score for grade in grades] == [0.0] * len(texts)
    assert grades[0].outcome == "timeout"
    assert took < 2.5 * len(texts)  # each within its second, a new worker's start included
    assert score_many([r"\boxed{18}", r"\boxed{19}"], ["18", "18"], timeout=20) == [1.0, 0.0]


def test_hostile_text_without_a_box_or_before_the_right_one():
    assert score_many(HOSTILE.values(), ["18"] * len(HOSTILE), "lenient", timeout=1.0) == [0.0] * len(HOSTILE)
    texts = [text + r" \boxed{18}" for text in HOSTILE.values()]
    assert score_many(texts, ["18"] * len(texts), timeout=20) == [1.0] * len(texts)


def test_a_right_answer_may_be_huge():
    assert score_many([rf"\boxed{{{'7' * 10_000}}}"], ["7" * 10_000], timeout=20) == [1.0]


def test_one_warning_for_each_timeout(caplog):
    with caplog.at_level(logging.WARNING):
        grades = grade_many([r"hm, \boxed{99999999!}", r"\boxed{18}"], ["18", "18"], timeout=1.0)
    assert grades[0] == (0.0, "timeout")
    (record,) = [record for record in caplog.records if record.name == reward.logger.name]
    assert r"'\\boxed{99999999!}', 17 characters" in record.getMessage()


def test_a_gold_without_an_answer_in_it_is_reported_not_scored_in_silence():
    assert grade_many([r"\boxed{18}"], ["."], timeout=20) == [(0.0, "error")]


def test_bad_arguments():
    with pytest.raises(ValueError, match="mode must be 'strict' or 'lenient', got 'exact'"):
        score_many(["1"], ["1"], "exact")
    with pytest.raises(ValueError, match="equally many, got 2 and 1"):
        score_many(["1", "2"], ["1"])
    for gold in ("", None, " "):
        with pytest.raises(ValueError, match=re.escape(f"golds[1] must be a non-empty string, got {gold!r}")):
            score_many(["1", "1"], ["1", gold])
    with pytest.raises(ValueError, match=re.escape("completions[0] must be a string")):
        score_many([None], ["1"])


def test_eight_threads_at_once():
    def work(i):
        answers = [rf"\boxed{{{i * 100 + k}}}" for k in range(20)]
        answers[i] = r"\boxed{99999999!}" if i < 2 else r"\boxed{-1}"
        scores = score_many(answers, [str(i * 100 + k) for k in range(20)], timeout=2.0)
        return scores == [0.0 if k == i else 1.0 for k in range(20)]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


# ---- OpenRLHF's convention ----


def test_reward_func_reads_the_response_and_not_the_prompt():
    prompt = "<|im_start|>user\nLike this: \\boxed{18}. What is 9 + 9?<|im_end|>\n<|im_start|>assistant\n"
    answers = [r"It is \boxed{18}.<|im_end|>", "It is 18.<|im_end|>", r"It is \boxed{19}.<|im_end|>"]
    whole = [prompt + answer for answer in answers]
    cut_on_the_left = [query[30:] for query in whole]
    with_bos = ["<s> " + query for query in whole]
    for queries in (whole, cut_on_the_left, with_bos):
        result = reward_func(queries, [prompt] * 3, ["18", 18, "18"])
        assert torch.equal(result["rewards"], torch.tensor([1.0, 0.0, 0.0]))
        assert torch.equal(result["scores"], result["rewards"])
        assert {name: log.tolist() for name, log in result["extra_logs"].items()} == {
            "verifier_timeout": [0.0] * 3,
            "verifier_crash": [0.0] * 3,
            "verifier_error": [0.0] * 3,
        }
    with pytest.raises(ValueError, match="cannot tell the response from its prompt"):
        reward_func([r"something else \boxed{18}"], [prompt], ["18"])


def test_openrlhf_loads_the_file_by_path_and_calls_it_in_threads():
    agent = pytest.importorskip("openrlhf.utils.agent")
    executor = agent.SingleTurnAgentExecutor(str(REWARD_FILE))
    assert executor.reward_func.__module__ == "reward_func"
    executor.reward_func = partial(executor.reward_func, timeout=1.5)

    async def rollout():
        answers = [r"\boxed{18}", r"\boxed{99999999!}", "18"]
        return await asyncio.gather(
            *[executor._fetch_rewards_via_func(["9 + 9 = ?" + answer], ["9 + 9 = ?"], ["18"]) for answer in answers]
        )

    good, hung, unboxed = [results[0] for results in asyncio.run(rollout())]
    assert good["rewards"].tolist() == [1.0]
    assert hung["rewards"].tolist() == [0.0] and hung["extra_logs"]["verifier_timeout"].tolist() == [1.0]
    assert unboxed["rewards"].tolist() == [0.0] and unboxed["extra_logs"]["verifier_timeout"].tolist() == [0.0]


def test_workers_are_light():
    modules = f"{reward.__name__}, {reward.GRADER.partition(':')[0]}"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'ray', 'openrlhf'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
