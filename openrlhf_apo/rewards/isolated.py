"""`--reward.isolate`: a reward file in processes of its own, which hold none of the run's secrets and can be killed.

What a call can do to its process (end it, fill its memory, hang in C code, block signals, print for ever) costs that
sample its reward, and the run nothing.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openrlhf_apo.errors import OptionError, RewardFailure, in_one_line
from openrlhf_apo.rewards.pool import WorkerPool
from openrlhf_apo.rewards.reward import Answer, Reward, reward_of

WORKERS = 2
WHY = {"crash": "ended its process (an exit, a crash, or more memory than it may have)", "error": "returned no JSON"}


class IsolatedReward:
    """path: a .py file with `reward_func(queries, prompts, labels)`, as RemoteReward. timeout: seconds a call may
    take."""

    not_verified = 0

    def __init__(self, path: str, timeout: float, workers: int = WORKERS):
        self.path, self.timeout, self.workers = path, timeout, workers
        self.pool = WorkerPool("openrlhf_apo.rewards.isolated:load", workers, setup=(path,))
        try:
            self.pool.wait_until_ready()
        except RuntimeError as error:
            raise OptionError(f"the reward {path} cannot be loaded: {str(error).splitlines()[0]}") from None

    def check_label(self, label: object) -> None:
        """Any label will do: the function knows what it gets."""

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward | RewardFailure | None]:
        failures: list[RewardFailure] = []

        def score(answer: Answer) -> Reward | RewardFailure | None:
            if len(failures) > max_failures:
                return None
            found = self._one(answer)
            if isinstance(found, RewardFailure):
                failures.append(found)
            return found

        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(score, answers))

    def _one(self, answer: Answer) -> Reward | RewardFailure:
        query = answer.prompt + answer.response
        value, outcome = self.pool.call(query, answer.prompt, answer.label, timeout=self.timeout)
        if outcome == "timeout":
            return RewardFailure(f"took more than {self.timeout:g} s")
        if outcome != "ok":
            return RewardFailure(WHY[outcome])
        returned, error = value
        try:
            return RewardFailure(error) if error else reward_of(returned)
        except RewardFailure as failure:
            return failure
        except (TypeError, ValueError) as error:  # no number
            return RewardFailure(f"raised {in_one_line(error)}")


def load(path: str) -> Callable[[str, str, object], tuple[Any, str | None]]:
    """In the worker: (query, prompt, label) -> (what reward_func returned for it as JSON holds it, why it failed)."""
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look names up
    spec.loader.exec_module(module)
    reward_func = module.reward_func

    def call(query: str, prompt: str, label: object) -> tuple[Any, str | None]:
        try:
            return _plain(reward_func([query], [prompt], [label])), None
        except MemoryError:
            raise  # the pool ends the process
        except Exception as error:  # whatever the file raises
            return None, f"raised {in_one_line(error)}"

    return call


def _plain(value):
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value
