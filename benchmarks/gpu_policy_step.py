"""A training pass of Qwen3-1.7B on a GPU: OpenRLHF's Actor against this project's log-probs.

    python benchmarks/gpu_policy_step.py

Needs torch and transformers only. The shape of Qwen3-1.7B with random weights, bf16, SDPA; a group of P = 8 samples of
256 + 768 tokens as one micro-batch; forward and backward of the sum of their response log-probs, with and without
gradient checkpointing. OpenRLHF's Actor is written out in upstream_actor.py.

MFU is model FLOPs over time and the card's dense bf16 peak. Model FLOPs are 6 per weight and token of the layers, 6
per weight of the output matrix and response token (what the objective needs of it), and 12 x width x pairs per layer
of causal attention; recomputation does not count. The two floors: model FLOPs over the peak; and the least bytes,
weights read forward and backward and gradients written, over the memory's bandwidth. `--cpu` runs a small shape
without a GPU.
"""

import sys
import time
from dataclasses import dataclass

import torch
from measure import alternated, make_parser, medians, print_ratios, print_table, ratio, write_json
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from upstream_actor import upstream_log_probs

# By part of the card's name, the more particular first: dense bf16 FLOP/s, bytes/s. From the vendor's data sheets.
CARDS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "RTX 4090": (165e12, 1.008e12),
}


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int


QWEN3_1_7B = Shape(151_936, 2048, 6144, 28, 16, 8, 128)
SMALL = Shape(8_192, 128, 384, 2, 4, 2, 32)


@dataclass(frozen=True)
class Batch:
    samples: int
    prompt: int
    response: int

    @property
    def length(self) -> int:
        return self.prompt + self.response


def make_model(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype)


def model_flops(shape: Shape, batch: Batch) -> float:
    """Of a forward and a backward pass, without recomputation."""
    queries, keys = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
    layer = shape.hidden * (2 * queries + 2 * keys) + 3 * shape.hidden * shape.intermediate
    tokens, pairs = batch.samples * batch.length, batch.samples * batch.length * (batch.length + 1) / 2
    dense = 6 * shape.layers * layer * tokens
    head = 6 * shape.hidden * shape.vocabulary * batch.samples * batch.response
    attention = 12 * shape.layers * queries * pairs
    return dense + head + attention


def least_bytes(parameters: int, element: int) -> float:
    """Weights read forward and backward, gradients written."""
    return 3.0 * parameters * element


def peaks_of(card: str) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) of a card by the name that CUDA has for it."""
    return next((peaks for name, peaks in CARDS.items() if name in card), None)


class Pass:
    """One forward and backward over the batch, as either side computes it."""

    def __init__(self, shape: Shape, batch: Batch, device: str, repeats: int):
        self.device, self.repeats = device, repeats
        self.model = make_model(shape, device, torch.bfloat16 if device == "cuda" else torch.float32).train()
        generator = torch.Generator().manual_seed(0)
        self.sequences = torch.randint(shape.vocabulary, (batch.samples, batch.length), generator=generator).to(device)
        self.attention_mask = torch.ones_like(self.sequences)
        places = torch.arange(1, batch.length, device=device) >= batch.prompt
        self.action_mask = places.long().expand(batch.samples, -1)  # [B, T-1]

    def log_probs(self, who: str) -> torch.Tensor:
        batch = (self.sequences, self.attention_mask, self.action_mask)
        if who == "openrlhf":
            return upstream_log_probs(self.model, *batch)
        from openrlhf_apo.ranks.log_probs import response_log_probs

        return response_log_probs(self.model, *batch)[0]

    def measure(self, who: str, checkpointing: bool) -> dict:
        """Seconds of a pass (the mean of `repeats`, after one that is not counted), and the peak of allocated GPU
        memory [GB], with what of it is above the weights."""
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()
        self.model.zero_grad()
        self._once(who)
        cuda = self.device == "cuda"
        if cuda:
            self.model.zero_grad()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.model.zero_grad()
            self._once(who)
        if cuda:
            torch.cuda.synchronize()
        found = {"seconds": (time.perf_counter() - start) / self.repeats}
        if cuda:
            peak = torch.cuda.max_memory_allocated()
            found |= {"peak_gb": peak / 1e9, "above_weights_gb": (peak - held) / 1e9}
        return found

    def _once(self, who: str) -> None:
        self.log_probs(who).sum().backward()


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--cpu", action="store_true", help="a small shape in fp32, without CUDA")
    parser.add_argument("--samples", type=int, help="default 8")
    parser.add_argument("--prompt_tokens", type=int, help="default 256; 32 with --cpu")
    parser.add_argument("--response_tokens", type=int, help="default 768; 96 with --cpu")
    parser.add_argument("--repeats", type=int, default=5, help="passes of a measurement")
    parser.add_argument(
        "--peak_flops", type=float, help="the card's dense bf16 FLOP/s, where CARDS has it not or wrong"
    )
    parser.add_argument("--bandwidth", type=float, help="the card's memory bandwidth, bytes/s")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("no CUDA here: run this where there is a GPU, or with --cpu", file=sys.stderr)
        return 2
    shape, device = (SMALL, "cpu") if args.cpu else (QWEN3_1_7B, "cuda")
    batch = Batch(
        args.samples or 8,
        args.prompt_tokens or (32 if args.cpu else 256),
        args.response_tokens or (96, 768)[not args.cpu],
    )
    known = None if args.cpu else peaks_of(torch.cuda.get_device_name())
    peak_flops = args.peak_flops or (known and known[0])
    bandwidth = args.bandwidth or (known and known[1])
    work = Pass(shape, batch, device, args.repeats)
    parameters = sum(weight.numel() for weight in work.model.parameters())
    calls = {
        f"checkpointing {'on' if on else 'off'} {who}": lambda on=on, who=who: work.measure(who, on)
        for on in (True, False)
        for who in ("apo", "openrlhf")
    }
    measurements = alternated(calls, args.runs)
    middle = medians(measurements)
    flops, tokens = model_flops(shape, batch), batch.samples * batch.length
    rows = []
    for case, values in middle.items():
        mfu = f"{flops / values['seconds'] / peak_flops:.1%}" if peak_flops else ""
        memory = [values.get("peak_gb"), values.get("above_weights_gb")]
        rows.append([case, 1e3 * values["seconds"], tokens / values["seconds"], mfu, *memory])
    print_table(["case", "ms", "tokens/s", "MFU", "peak, GB", "above the weights, GB"], rows)
    print(f"\n{parameters / 1e9:.3f} B parameters, {tokens:,} tokens, {flops:.3g} model FLOPs")
    floors = {}
    if peak_flops:
        floors["flops_s"] = flops / peak_flops
    if bandwidth:
        floors["bytes_s"] = least_bytes(parameters, 2 if device == "cuda" else 4) / bandwidth
    for name, seconds in floors.items():
        print(f"floor of {name.removesuffix('_s')}: {1e3 * seconds:.3g} ms")
    found = {}
    for on in ("on", "off"):
        ours, theirs = middle[f"checkpointing {on} apo"], middle[f"checkpointing {on} openrlhf"]
        for key in ("seconds", "above_weights_gb"):
            if key in ours:
                found[f"checkpointing {on}: {key}"] = ratio(ours[key], theirs[key], "lower")
    print_ratios(found, {})
    write_json(
        args.json, "gpu_policy_step", measurements, found, flops=flops, tokens=tokens, floors=floors, peak=peak_flops
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
