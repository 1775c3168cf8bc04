"""Python processes that have torch and transformers imported already.

They are forked from one that has, which each of pytest's workers starts once. An interpreter of its own takes 4 s of
CPU more, and the end-to-end tests start a hundred.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import torch

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["openrlhf_apo.embedded.launch"])


def start(
    arguments: list[str], stdout: Path, stderr: Path, environment: dict[str, str]
) -> multiprocessing.process.BaseProcess:
    """`python *arguments`, that is -m MODULE, -c CODE or FILE and its own arguments, with these as environment."""
    process = _SERVER.Process(target=_run, args=(arguments, stdout, stderr, environment, os.getcwd()))
    process.start()
    return process


def _run(arguments: list[str], stdout: Path, stderr: Path, environment: dict[str, str], folder: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if threads := environment.get("OMP_NUM_THREADS"):  # read when torch loads, which it has
        torch.set_num_threads(int(threads))
    kind, *rest = arguments
    sys.argv = [kind, *rest[1:]] if kind in ("-m", "-c") else arguments
    try:
        if kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out
        sys.stdout.flush()
        sys.stderr.flush()
