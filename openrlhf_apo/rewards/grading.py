"""Whether one answer equals the gold answer: what the worker processes of math_verify.py run, and alone import
math-verify for (SymPy with it, half a second)."""

import logging
import re
from functools import lru_cache

from math_verify import parse, verify

from openrlhf_apo.rewards.text_answers import equal_as_text

# It warns that its own time limit, a signal.alarm, is off: the pool's limit is the one that holds.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def grade(completion: str, gold: str, mode: str) -> float:
    """1.0 or 0.0. May take for ever, all memory or the process: call it through the pool."""
    boxed = last_boxed(completion)
    if boxed is not None:
        equal = equal_as_text(boxed, gold)
        if equal is not None:
            return float(equal)
        answer = _box(boxed)
    elif mode == "lenient":
        answer = completion.rpartition("####")[2]
    else:
        return 0.0
    # Either side may leave a percent sign out. math-verify itself agrees where the numbers are integers.
    return float(_equal(answer, gold) or ("%" in answer + gold and _equal(_no_percent(answer), _no_percent(gold))))


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces balanced; None where there is none or it is not closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # "\{" and "\}" are text, not braces
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start : start + brace.start()]
    return None


@lru_cache(maxsize=4096)  # many answers of a group are the same
def _equal(answer: str, gold: str) -> bool:
    return verify(_parse_gold(gold), parse(answer, parsing_timeout=None), timeout_seconds=None, raise_on_error=True)


@lru_cache(maxsize=1024)
def _parse_gold(gold: str) -> list:
    parsed = parse(_box(gold), parsing_timeout=None)  # cached, because the completions of a prompt share it
    if not parsed:
        raise ValueError(f"no answer in gold {gold!r}")  # or every completion would quietly be wrong
    return parsed


def _box(answer: str) -> str:
    return rf"\boxed{{{answer.rstrip(' .')}}}"


def _no_percent(text: str) -> str:
    return re.sub(r"\\?%", "", text)
