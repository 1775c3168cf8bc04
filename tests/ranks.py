"""Processes of one process group, without Ray: started together, and ended together at the first that fails."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

BELOW_EPHEMERAL = range(20000, 32768)  # a port the kernel gives to no outgoing connection


def free_port() -> int:
    # The system's randomness: code under test seeds Python's, and two workers would draw the same port.
    for port in random.SystemRandom().sample(BELOW_EPHEMERAL, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("none of 100 ports is free")


def run_ranks(arguments: list[str], ranks: int, folder: Path, timeout: float = 300) -> None:
    """Run `python *arguments` once per rank; fail with the last lines of every rank if one fails or time runs out."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    place |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, path in enumerate(logs):
        with path.open("w") as log:
            environment = os.environ | place | {"RANK": str(rank)}
            command = [sys.executable, *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
    codes = [code if process.wait() == code else "killed" for process, code in zip(processes, codes, strict=True)]
    said = [f"rank {k}: {code}\n{logs[k].read_text()[-3000:]}" for k, code in enumerate(codes)]
    assert codes == [0] * ranks, "\n".join(said)
