"""A training pass with each prompt computed once for its answers, against whole sequences, by micro-batch size.

    .venv/bin/python benchmarks/shared_prompts.py

Forward and backward over 128 samples, the answers to 16 prompts: log-probs of the answers, fp32, random weights of two
sizes. Shown is what `openrlhf_apo.ranks.shared_prompts` does below its limit too, so that the table says where that
limit should be.
"""

import time

import torch
from measure import alternated, make_parser, medians, number, print_table, ratio, write_json
from transformers import AutoModelForCausalLM
from workload import SIZES, Work, make_model

from openrlhf_apo.ranks import shared_prompts
from openrlhf_apo.ranks.log_probs import response_log_probs


def samples(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """sequences [N, T] and action_mask [N, T-1], the answers to a prompt beside each other."""
    vocabulary, count = SIZES[work.size].vocabulary, work.prompts * work.group
    prompts = torch.randint(1, vocabulary, (work.prompts, work.prompt_tokens)).repeat_interleave(work.group, 0)
    sequences = torch.cat([prompts, torch.randint(1, vocabulary, (count, work.response_tokens))], 1)
    action_mask = torch.ones_like(sequences[:, 1:])
    action_mask[:, : work.prompt_tokens - 1] = 0
    return sequences, action_mask


def timed_pass(model, work: Work, micro_batch: int, share: bool) -> dict:
    sequences, action_mask = samples(work)
    start = time.perf_counter()
    for cut in (slice(k, k + micro_batch) for k in range(0, len(sequences), micro_batch)):
        ids, mask = sequences[cut], action_mask[cut]
        log_probs, _ = response_log_probs(model, ids, torch.ones_like(ids), mask, share_prompts=share)
        log_probs.sum().backward()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return {"pass_s": seconds}


def spared(work: Work, micro_batch: int) -> int:
    """Prompt tokens of a micro-batch that are not computed again."""
    return (micro_batch - -(-micro_batch // work.group)) * work.prompt_tokens


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--micro_batches", nargs="+", type=int, default=[16, 32, 64, 128])
    args = parser.parse_args()
    limit, shared_prompts.FEWEST_SPARED = shared_prompts.FEWEST_SPARED, 1
    works = {size: Work(size) for size in args.sizes}
    models = {size: AutoModelForCausalLM.from_pretrained(make_model(size)) for size in args.sizes}
    cases = {
        f"{size} {count} {way}": lambda size=size, count=count, share=way == "shared": timed_pass(
            models[size], works[size], count, share
        )
        for size in args.sizes
        for count in args.micro_batches
        for way in ("whole", "shared")
    }
    for measure in cases.values():
        measure()  # to warm up
    measurements = alternated(cases, args.runs)
    middle = medians(measurements)
    found, rows = {}, []
    for size in args.sizes:
        for count in args.micro_batches:
            pair = f"{size} {count}"
            whole, shared = (middle[f"{pair} {way}"]["pass_s"] for way in ("whole", "shared"))
            found[f"{pair}: pass_s"] = ratio(shared, whole, "lower")
            rows.append([pair, whole, shared, shared / whole, str(spared(works[size], count))])
    header = [
        "model, micro-batch",
        "whole sequences, s",
        "shared prompts, s",
        "ratio",
        "tokens spared by a micro-batch",
    ]
    print_table(header, rows)
    print(f"used from {number(limit)} spared tokens on")
    write_json(args.json, "shared_prompts", measurements, found, limit=limit)


if __name__ == "__main__":
    main()
