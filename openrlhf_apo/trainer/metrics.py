"""metrics.jsonl: what a run measured, one strict JSON object per rollout.

Keys that scripts and the report rely on; a signal that a mode does not have is absent:

- `step`: the number of the rollout, from 1; 0 is the evaluation before training
- rewards: `reward_mean`, `reward_std`, `zero_variance_fraction`, `reward_failures`, `verifier_failures`; `score_mean`
  and `reward/<name>` where a reward function gives `scores` and `extra_logs`, and of several rewards: the first one's,
  and each one's by its name
- α: `alpha`, `confidence` (c_t), `improvement` (p_t), `reward_baseline`, `reward_scale`, `ess` (ESS/P), `ess_outcome`
  (root, clamped_hi, clamped_lo or skipped; with an α per group, how many groups had which)
- group policies: `divergence`, `entropy_p` and `entropy_q` (over log P), `max_weight`, `log_ratio_std` [nats]
- samples: `rollout_mismatch` (of the groups that are not stale), `response_length` [tokens], `truncated_fraction`,
  of conversations `feedback_length` (what the environment said, beside response_length) [tokens],
  `token_entropy` (−mean log π of the sampled tokens, an estimate of the entropy per token) [nats]; `generations` and
  `filtered_groups` of dynamic sampling; `stale_groups`, sampled by an earlier policy, and `surplus_groups`, left for
  the next rollouts; `guidance_tokens` of guidance; with asynchronous training `staleness`, optimizer steps between the
  policy that sampled and the start of training, and `staleness_kl`, the KL that they have made, of the rollout's first
  step (k3, per token) [nats]
- objectives: `loss`; `clipped_fraction` of tokens and `ppo_kl` [nats] of token objectives; `kl` to the reference and
  `entropy` per token [nats] where they are measured; `adrpo_beta_mean`, `adrpo_beta_max`; `clip_low`, `clip_high` and
  `positive_share` of bapo; `conflict_fraction` of gtpo; of a correction for the engine `is_filtered_fraction` (of
  tokens, or of answers) and `is_weight_mean` (per token, of token objectives)
- `kl_coef`, the coefficient that `--algo.kl.target` sets
- recovery: `restarts` of the whole run, `engine_restarts`
- machinery: `grad_norm`, `tokens_per_s`, `time/<phase>` [s] (generate, reward, update, sync, eval, save,
  ...) and `time/step` [s]
- evaluations, on the line of the rollout they follow: `eval/pass1`, the mean score (of a reward without scores, the
  mean reward), and `eval/pass<k>`, the mean of the best of k, where all of the evaluation are 0 or 1. Where one is
  not, nothing was passed or failed, and they are `eval/score_mean` and `eval/score_best<k>`. `eval/distinct_right`:
  how many different answers of the k have a score above 0. `eval/<source>/...` for each data set where there are
  several
- `inner/<key>`: a list, one value per optimizer step inside the rollout
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn, TextIO

from openrlhf_apo.trainer.files import move_aside

logger = logging.getLogger(__name__)


class MetricsFile:
    """Append-only writer of one run's metrics.jsonl; a line is on disk when `write` returns.

    With `resume_step=k` the file goes on after step k: later lines, which the resumed run measures again, and a line
    torn by a kill are removed. Without it the run is a new one, and a file already there is moved aside to
    metrics.jsonl.1 (.2, ... when that is taken), so that two runs never mix. every_step: False for a file that has no
    line of most steps, as sample_file.py's.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, every_step: bool = True):
        self.path, self.every_step = Path(path), every_step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = -1 if resume_step is None else resume_step
        if self.path.exists():
            if resume_step is None:
                self._rotate()
            else:
                self._truncate(resume_step)
        elif resume_step and every_step:
            logger.warning("%s is missing: the metrics of steps 1 to %d are lost", self.path, resume_step)

    def write(self, metrics: dict) -> None:
        """Append one line: `step` and finite numbers, strings, tensors, arrays, or lists and dicts of them.

        Raises ValueError, and writes nothing, when `step` does not increase or a value is not finite or no such value.
        """
        row = {key: _plain(value, key, metrics.get("step")) for key, value in metrics.items()}
        step = row.get("step")
        if type(step) is not int or step <= self.last_step:
            raise ValueError(f"{self.path}: `step` must be an integer above {self.last_step}, got {step!r}")
        with open(self.path, "a", encoding="utf-8") as file:
            _write_rows(file, [{"step": step} | row])  # step first, for the reader's eye
        self.last_step = step

    def _rotate(self) -> None:
        logger.warning("%s is of another run: moved to %s", self.path, move_aside(self.path).name)

    def _truncate(self, resume_step: int) -> None:
        rows = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        if self.every_step and resume_step and (not rows or rows[-1]["step"] < resume_step):
            logger.warning("%s ends before step %d, where the run resumes", self.path, resume_step)
        tmp = self.path.with_name(self.path.name + ".tmp")
        with open(tmp, "w", encoding="utf-8") as file:
            _write_rows(file, rows)
        os.replace(tmp, self.path)


def read_metrics(path: str | Path) -> list[dict]:
    """The lines of a metrics.jsonl, oldest first.

    A last line that was cut off (no newline, not valid JSON) is left out with a warning: a killed run leaves one.
    Anything else that is not a strict JSON object with a `step` raises ValueError naming the line.
    """
    *lines, tail = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    if tail:
        try:
            rows.append(_parse(tail, path, len(lines) + 1))
        except ValueError:
            logger.warning("%s: the last line is torn, left out", path)
    return rows


def as_score(key: str) -> str:
    """What `eval/pass1` or another pass rate is called where rewards are graded; any other key stays."""
    return re.sub(
        r"^(eval/(?:.*/)?)pass(\d+)$", lambda m: m[1] + ("score_mean" if m[2] == "1" else f"score_best{m[2]}"), key
    )


def held_out(rows: list[dict]) -> tuple[str, list[tuple[int, float]]]:
    """The mean reward of each evaluation: its key, and (rollout, value). Rewards of a run are graded where those of
    one evaluation are; another in which all happened to be 0 or 1 is an evaluation of the same scores."""
    keys = ("eval/score_mean", "eval/pass1")
    found = [(row["step"], row[key]) for row in rows for key in keys if key in row]
    return keys[0] if any(keys[0] in row for row in rows) else keys[1], found


def first_and_last_fifth(
    values: list[float], average: Callable[[list[float]], float] = fmean
) -> tuple[float, float, int]:
    """The averages of the first and the last fifth of values[N], and how many values a fifth is, at least one."""
    size = max(1, len(values) // 5)
    return average(values[:size]), average(values[-size:]), size


def _plain(value: Any, key: str, step: object) -> Any:
    """`value` as JSON holds it: a number, a string, or a list or dict of them."""
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and scalars, without importing either
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item, key, step) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item, key, step) for name, item in value.items()}
    if not isinstance(value, int | float | str):
        raise ValueError(f"metric `{key}` at step {step} is {value!r}: leave out a key that has no value")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric `{key}` at step {step} is {value}")
    return value


def _write_rows(file: TextIO, rows: list[dict]) -> None:
    file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    file.flush()
    os.fsync(file.fileno())


def _parse(line: str, path: str | Path, number: int) -> dict:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"{path}, line {number}: not a JSON object with an integer `step`")
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
