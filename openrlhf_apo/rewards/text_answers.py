r"""Answers that are words, or numbers with words: `\text{Saturday}`, `\textbf{(B)}`, `4:30 \text{ p.m.}`.

math-verify reads mathematics: to it `4:30 \text{ p.m.}` is the fraction 4/30 and `\text{4:30 p.m.}` a variable. Here
such answers are compared by what they say.
"""

import re

_NAME = r"\\(?:text(?:normal|rm|bf|it|sf|tt|up)?|math(?:normal|rm|bf|it|sf|tt)|[mh]box)\s*"
# Not after ^ or _, where the braces also say how much is raised or lowered.
_TEXT_COMMAND = re.compile(rf"(?<![\^_]){_NAME}\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")  # and not the name of a command
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\.\d+|\S", re.DOTALL)
_SPACES = {"~", r"\ ", r"\,", r"\:", r"\;", r"\>", r"\!", r"\quad", r"\qquad"}
_TIME = re.compile(r"(\d{1,2})(?: : (\d\d))?(?: ([ap]) m)?")
# Of `2\text{ hours }30\text{ minutes}` math-verify reads the 2. It does read a list, `2\text{ or }30\text{ minutes}`.
_READ_IN_PART = re.compile(rf"\d.*{_NAME}\{{(?!\s*(?:and|or)\s*\}})[^{{}}]*\}}.*(?<!\^)\d.*{_NAME}\{{", re.DOTALL)

_LETTERS = re.compile(r"[A-Z]{3,}")  # an order, say: to math-verify a product, so that BAC would be ABC
_BASE = re.compile(r"\w+_(?:\{(\d+)\}|(\d))")  # of a number: 101_2, of which math-verify reads 101


def equal_as_text(answer: str, gold: str) -> bool | None:
    r"""Whether two answers say the same: True or False, or None where math-verify has to decide.

    Text commands, spaces, case and the dots of abbreviations do not count; a space between digits does (`1 2` is not
    `12`). Only answers with a text command or a word of several letters, and times of day, are decided here, so the
    case of a variable is left to math-verify (which takes `x` and `X` for one).
    """
    both = answer.strip(" ."), gold.strip(" .")
    if all(map(_LETTERS.fullmatch, both)):
        return both[0] == both[1]
    if (bases := [match[1] or match[2] for match in map(_BASE.fullmatch, both) if match]) and len(set(bases)) == 2:
        return False
    answer_text, gold_text = _plain(answer), _plain(gold)
    answer_time, gold_time = _time(answer_text), _time(gold_text)
    if answer_time and gold_time:
        halves = {answer_time[1], gold_time[1]} - {None}  # like any unit, a.m. and p.m. may be left out
        if halves or answer_time == gold_time:
            return answer_time[0] == gold_time[0] and len(halves) < 2
    if any(_TEXT_COMMAND.search(side) or _WORD.search(side) for side in (answer, gold)):
        if gold_text and answer_text.replace(" ", "") == gold_text.replace(" ", ""):
            return answer_text == gold_text
    if _READ_IN_PART.search(gold) and _numbers(answer_text) != _numbers(gold_text):
        return False
    return None


def _plain(answer: str) -> str:
    r"""The answer's letters, numbers, signs and commands, with one space between: `4 : 30 p m`."""
    while (unwrapped := _TEXT_COMMAND.sub(r"\1", answer)) != answer:
        answer = unwrapped
    answer = re.sub(r"(?<=[a-zA-Z])\.(?!\d)", "", answer.rstrip(" ."))
    tokens = [token for token in _TOKEN.findall(answer) if token not in _SPACES]
    return " ".join(token if token.startswith("\\") else token.lower() for token in tokens)


def _time(text: str) -> tuple[tuple[int, int], str | None] | None:
    """((hour, minute), "a", "p" or None) where the plain text is a time of day, or a number that could be an hour."""
    match = _TIME.fullmatch(text)
    return match and ((int(match[1]), int(match[2] or 0)), match[3])


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?|\.\d+", re.sub(r" , (?=\d{3}\b)", "", text))
