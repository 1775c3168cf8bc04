r"""The reward for mathematics: 1.0 where a completion's final answer equals the gold answer, else 0.0.

Mathematics is compared by the math-verify library (https://github.com/huggingface/Math-Verify), boxed words by
`text_answers.py`, both (`grading.py`) in worker processes that are killed when an answer takes too long (`pool.py`).
There are two readings of "the final answer":

- "strict": the content of the last `\boxed{...}`, nothing else. The one to train with: a policy gains nothing by
  scattering numbers over its text.
- "lenient": the last `\boxed{...}` where there is one, else the number or expression after "the answer is", else the
  last one in the text. Where there is a `####`, only what follows it is read. For the answers of models that were
  never told to box.

So `\frac{3}{4}` equals `0.75`; `1,234` equals `1234`; `20\%` equals `20` and also `0.2`. A rounded fraction is equal
from six decimals on: `0.333333` is `\frac{1}{3}`, `0.3333` is not. A unit beside a number does not count, be it left
out or another one: `18`, `\$18` and `18\text{ cm}` are equal. `\text{18 cm}` is words: it equals `18\text{ cm}` and
not `18`, as `\text{4:30 p.m.}` equals `4:30 \text{ PM}` and not `4:30 \text{ a.m.}`.

OpenRLHF can load this file by path too: `--reward.remote_url openrlhf_apo/rewards/math_verify.py`.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from openrlhf_apo.rewards.pool import shared_pool

logger = logging.getLogger(__name__)

GRADER = "openrlhf_apo.rewards.grading:grade"
WORKERS = 2
MAX_CHARS = 20_000  # only this much of a completion's end is read: final answers are at the end
PROMPT_TAIL = 32  # characters: "<|im_end|>\n<|im_start|>assistant\n" and the like


class Grade(NamedTuple):
    """The score of one answer, 1.0 or 0.0, and how it was found: "ok", or why it had to be 0.0: "timeout", "crash"
    or "error" (see `pool.Result`)."""

    score: float
    outcome: str


def reward_func(queries, prompts, labels, mode="strict", timeout=5.0, **kwargs) -> dict:
    """OpenRLHF 0.11.2's reward file convention (`openrlhf/utils/agent.py`), called from any thread.

    queries: N decoded texts, prompt and response together, special tokens included. labels: N gold answers.
    mode, timeout: as in `grade_many`, whose errors it raises, and ValueError for a query without its prompt's end.
    Returns "rewards" and "scores", both [N], 1.0 or 0.0, and "extra_logs" with three [N] indicators of failed grading.
    """
    import torch  # here, because nothing else needs it

    completions = [_completion(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    golds = [str(label) if isinstance(label, int | float) else label for label in labels]
    grades = grade_many(completions, golds, mode, timeout)
    scores = torch.tensor([grade.score for grade in grades])
    failures = {
        f"verifier_{failure}": torch.tensor([float(grade.outcome == failure) for grade in grades])
        for failure in ("timeout", "crash", "error")
    }
    return {"rewards": scores, "scores": scores, "extra_logs": failures}


def grade_many(
    completions: Sequence[str],
    golds: Sequence[str],
    mode: str = "strict",
    timeout: float = 5.0,
    workers: int = WORKERS,
) -> list[Grade]:
    r"""Grade completions[i] against golds[i] in worker processes shared by all of this process's threads.

    completions: the model's texts; the last MAX_CHARS characters of each are read.
    golds: numbers or LaTeX, not in dollar signs ("18", "\frac{3}{4}", "\text{Saturday}").
    mode: "strict" or "lenient", see the top of this file. timeout: seconds per answer, after which it scores 0.0.
    workers: how many processes; each number has a pool of its own.
    Raises ValueError for a bad argument and RuntimeError when no worker can start. No answer raises.
    """
    if mode not in ("strict", "lenient"):
        raise ValueError(f"mode must be 'strict' or 'lenient', got {mode!r}")
    if len(completions) != len(golds):
        raise ValueError(f"completions and golds must be equally many, got {len(completions)} and {len(golds)}")
    for i, (completion, gold) in enumerate(zip(completions, golds, strict=True)):
        if not isinstance(completion, str):
            raise ValueError(f"completions[{i}] must be a string, got {completion!r}")
        if not isinstance(gold, str) or not gold.strip():
            raise ValueError(f"golds[{i}] must be a non-empty string, got {gold!r}; check the data's label column")

    calls = [(completion[-MAX_CHARS:], gold, mode) for completion, gold in zip(completions, golds, strict=True)]
    grades = []
    for (text, gold, _), (score, outcome) in zip(calls, shared_pool(GRADER, workers).map(calls, timeout), strict=True):
        if outcome != "ok":
            start = max(text.rfind(r"\boxed{"), 0)
            logger.warning(
                "verifier %s (limit %g s), scored 0: answer %r, %d characters, gold %r",
                *(outcome, timeout, text[start : start + 80], len(text) - start, gold[:80]),
            )
        grades.append(Grade(score if outcome == "ok" else 0.0, outcome))
    return grades


def start_workers(workers: int = WORKERS) -> None:
    """Let the workers start before there are answers, without waiting for them."""
    shared_pool(GRADER, workers).start()


def _completion(query: str, prompt: str) -> str:
    """The response in `query`. The prompt may itself show a boxed answer, which must never be graded."""
    if query.startswith(prompt):
        return query[len(prompt) :]
    # The prompt was cut on the left or changed on its way through the tokenizer; its end is the part that survives.
    # Were the response to repeat it, the last place still leaves nothing but response.
    tail = prompt[-PROMPT_TAIL:]
    _, found, response = query.rpartition(tail)
    if not found:
        raise ValueError(f"cannot tell the response from its prompt: {query[:80]!r}... does not contain {tail!r}")
    return response
