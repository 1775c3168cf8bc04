"""What a training pass costs in memory and time on a CPU: OpenRLHF's Actor against this project's log-probs.

    .venv/bin/python benchmarks/policy_memory.py

A Qwen3 of 40.1 M parameters (vocabulary 151,936, tied; 2 layers, hidden 256, MLP 512, 4 heads of 64, 2 of keys), fp32,
random weights; 8 samples of 64 + 448 tokens; forward and backward of the sum of their response log-probs, as
micro-batches of 8 and of 1. Memory is the high-water mark of the resident set over the first pass, less what the
process held with the model loaded, in a fresh process for each measurement; gradients count. Time is the faster of two
further passes. OpenRLHF's Actor is written out in upstream_actor.py.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from measure import alternated, make_parser, medians, print_ratios, print_table, ratio, write_json

VOCABULARY, SAMPLES, PROMPT, RESPONSE = 151_936, 8, 64, 448
AIMS = {"8: peak_gb": "<= 1/12", "8: seconds": "<= 0.85", "1: peak_gb": "<= 0.5", "1: seconds": "<= 1.05"}


def status(key: str) -> float:
    """A line of this process's /proc/self/status, GB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e9


def measure_here(who: str, micro_batch: int, vocabulary: int, response: int) -> dict:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).train()
    length = PROMPT + response
    sequences = torch.randint(vocabulary, (SAMPLES, length))
    attention_mask = torch.ones(SAMPLES, length, dtype=torch.long)
    action_mask = (torch.arange(1, length) >= PROMPT).long().expand(SAMPLES, -1)  # [B, T-1]

    if who == "openrlhf":
        from upstream_actor import upstream_log_probs as log_probs
    else:
        from openrlhf_apo.ranks.log_probs import response_log_probs

        def log_probs(*batch):
            return response_log_probs(*batch)[0]

    def one_pass() -> float:
        model.zero_grad()
        start = time.perf_counter()
        for rows in torch.arange(SAMPLES).split(micro_batch):
            log_probs(model, sequences[rows], attention_mask[rows], action_mask[rows]).sum().backward()
        return time.perf_counter() - start

    warm_up(torch)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark starts here
    one_pass()
    peak = status("VmHWM") - before
    return {"peak_gb": peak, "seconds": min(one_pass() for _ in range(2))}


def warm_up(torch) -> None:
    """What the first matrix product, backward and thread pool take is neither side's."""
    weight = torch.ones(64, 64, requires_grad=True)
    (weight @ weight).logsumexp(-1).sum().backward()


def measure(who: str, micro_batch: int, vocabulary: int, response: int) -> dict:
    """In a process of its own."""
    here = [sys.executable, __file__, "--here", who, str(micro_batch), str(vocabulary), str(response)]
    return json.loads(subprocess.run(here, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[8, 1])
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--response_tokens", type=int, default=RESPONSE)
    parser.add_argument("--here", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure_here(args.here[0], *map(int, args.here[1:]))))
        return
    calls = {
        f"micro-batch {size} {who}": lambda size=size, who=who: measure(
            who, size, args.vocabulary, args.response_tokens
        )
        for size in args.micro_batches
        for who in ("apo", "openrlhf")
    }
    measurements = alternated(calls, args.runs)
    middle = medians(measurements)
    print_table(
        ["case", "peak above the model, GB", "s"], [[case, v["peak_gb"], v["seconds"]] for case, v in middle.items()]
    )
    found = {
        f"micro-batch {size}: {key}": ratio(
            middle[f"micro-batch {size} apo"][key], middle[f"micro-batch {size} openrlhf"][key], "lower"
        )
        for size in args.micro_batches
        for key in ("peak_gb", "seconds")
    }
    print_ratios(found, AIMS)
    write_json(args.json, "policy_memory", measurements, found)


if __name__ == "__main__":
    main()
