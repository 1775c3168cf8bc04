"""Processes of one process group, without Ray: started together, and ended together at the first that fails."""

import os
import random
import socket
import sys
import time
from pathlib import Path

import forked

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
    for log in logs:
        log.unlink(missing_ok=True)
    processes = [
        forked.start(arguments, log, log, os.environ | place | {"RANK": str(rank)}) for rank, log in enumerate(logs)
    ]
    ends = time.monotonic() + timeout
    while time.monotonic() < ends:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    codes = ["killed" if code is None else code for code in codes]
    said = [f"rank {k}: {code}\n{logs[k].read_text()[-3000:]}" for k, code in enumerate(codes)]
    assert codes == [0] * ranks, "\n".join(said)
