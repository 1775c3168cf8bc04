"""Wall time and peak memory of a command with everything it starts.

    .venv/bin/python benchmarks/peak_memory.py bash examples/scripts/train_apo_tiny_cpu.sh

Memory is the sum of the proportional set sizes (PSS) of the process tree, sampled twice a second.
"""

import subprocess
import sys
import time

import psutil


def tree_pss(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended, or is a kernel's
            continue
    return total


def main(command: list[str]) -> int:
    start, peak = time.time(), 0
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, tree_pss(root))
        time.sleep(0.5)
    print(f"{time.time() - start:.0f} s, peak {peak / 2**20:,.0f} MiB", file=sys.stderr)
    return process.returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python benchmarks/peak_memory.py COMMAND ...")
    sys.exit(main(sys.argv[1:]))
