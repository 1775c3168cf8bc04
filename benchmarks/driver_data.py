"""Samples pass through the driver as Python lists: bytes and seconds per million tokens of each hop.

    .venv/bin/python benchmarks/driver_data.py

The hops of a rollout: completions leave the engine (pickled and unpickled as Ray does it), become samples on the
driver (tokens to text), go to the ranks inside `load_steps` and become tensors there (ranks/micro_batch.py); with
every optimizer step, numbers per sample go to the ranks. GTPO alone asks for a number per token, `log_ratios`. Tokens
are those of prompts and responses. Engines and ranks share their work; what the driver does alone is summed up, and
docs/scaling.md says what follows for large runs.
"""

import random
import time
from collections.abc import Callable

import torch
from measure import alternated, make_parser, medians, print_table, ratio, write_json
from ray import cloudpickle
from workload import make_model

from openrlhf_apo.objectives import Terms
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.trainer.completions import Beginning, Completion, samples_of
from openrlhf_apo.trainer.samples import Prompt, Sample

GROUP, MICRO_BATCH, RANKS = 8, 8, 8
DRIVER_ALONE = (
    "engine to driver, unpickled",
    "completions to samples",
    "driver to ranks, pickled",
    "numbers per sample to ranks, pickled",
)
VOCABULARY = 500  # of the tokenizer that turns answers to text; ids are drawn up to 150,000 where none does


def completions_of(prompts: int, length: int, largest: int) -> list[list[Completion]]:
    numbers = random.Random(0)

    def completion() -> Completion:
        ids = [numbers.randrange(1, largest) for _ in range(length)]
        return Completion(ids, [-numbers.expovariate(1.0) for _ in range(length)], False)

    return [[completion() for _ in range(GROUP)] for _ in range(prompts)]


def pickled(value: object) -> tuple[bytes, list, float, float]:
    """(the bytes in the pickle, the buffers beside it, seconds there, seconds back)."""
    start = time.perf_counter()
    buffers: list = []
    data = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    middle = time.perf_counter()
    cloudpickle.loads(data, buffers=buffers)
    return data, buffers, middle - start, time.perf_counter() - middle


def timed(call: Callable[[], object]) -> tuple[object, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def measure(prompts: int, prompt_tokens: int, length: int) -> dict:
    """{"HOP: bytes" and "HOP: s" per million tokens} of one rollout with one optimizer step."""
    tokenizer = _tokenizer()
    tokens = prompts * GROUP * (prompt_tokens + length)
    found: dict[str, float] = {"tokens": tokens}

    def hop(name: str, seconds: float, size: int | None = None) -> None:
        found[f"{name}: s"] = seconds * 1e6 / tokens
        if size is not None:
            found[f"{name}: MB"] = size / tokens

    def travel(name: str, value: object) -> None:
        data, buffers, there, back = pickled(value)
        hop(f"{name}, pickled", there, len(data) + sum(buffer.raw().nbytes for buffer in buffers))
        hop(f"{name}, unpickled", back)

    travel("engine to driver", completions_of(prompts, length, 150_000))
    drawn = [Prompt(k, f"prompt {k}", "", "") for k in range(prompts)]
    ids = [[1 + (k + t) % (VOCABULARY - 1) for t in range(prompt_tokens)] for k in range(prompts)]
    completions = completions_of(prompts, length, VOCABULARY)
    samples, seconds = timed(lambda: samples_of(tokenizer, drawn, list(map(Beginning, ids)), completions))
    hop("completions to samples", seconds)
    for sample in samples:
        sample.reward = 1.0
    per_rank = -(-len(samples) // RANKS)
    shares: list[list[list[Sample]]] = []  # [rank][micro-batch]; in turn, where the trainer deals by length
    for rank in range(RANKS):
        mine = samples[rank * per_rank : (rank + 1) * per_rank]
        shares.append([mine[k : k + MICRO_BATCH] for k in range(0, len(mine), MICRO_BATCH)])
    travel("driver to ranks", [[share] for share in shares])
    _, seconds = timed(lambda: [MicroBatch.of(micro_batch, 0) for share in shares for micro_batch in share])
    hop("samples to tensors", seconds)
    terms = Terms({"log_prob": torch.zeros(len(samples), dtype=torch.float64)})
    travel("numbers per sample to ranks", [terms.take(list(range(k, len(samples), RANKS))) for k in range(RANKS)])
    travel("log-ratios per token to driver", [[0.1 * k for k in range(length)] for _ in samples])
    return found


def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_model("0.92M"))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=64, help=f"with {GROUP} answers each")
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--response_tokens", type=int, nargs="+", default=[256, 1024])
    args = parser.parse_args()
    measurements = alternated(
        {
            f"{length} tokens": lambda length=length: measure(args.prompts, args.prompt_tokens, length)
            for length in args.response_tokens
        },
        args.runs,
    )
    middle = medians(measurements)
    names = [key.removesuffix(": s") for key in next(iter(middle.values())) if key.endswith(": s")]
    rows = []
    for case, values in middle.items():
        for name in names:
            rows.append([f"{case}: {name}", values.get(f"{name}: MB"), values[f"{name}: s"]])
        rows.append([f"{case}: the driver alone", None, driver_alone(values)])
    print("per million tokens (prompts and responses)\n")
    print_table(["answers of: hop", "MB", "s"], rows)
    found = {
        f"{case}: driver's s per million tokens": ratio(driver_alone(values), 1.0, "lower")
        for case, values in middle.items()
    }
    write_json(args.json, "driver_data", measurements, found)


def driver_alone(values: dict[str, float]) -> float:
    return sum(values[f"{hop}: s"] for hop in DRIVER_ALONE)


if __name__ == "__main__":
    main()
