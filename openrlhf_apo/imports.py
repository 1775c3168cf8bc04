"""Importing the libraries quickly, and as a good neighbour."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

SPIN_COUNT = "3000"  # some 30 µs


@contextmanager
def quick_imports() -> Iterator[None]:
    """For imports of torch and of what needs it. Garbage is not looked for meanwhile, nor in what was imported later:
    there is none, and looking takes a fifth of the time. torch's threads (libgomp, which reads the variable when it
    loads) spin for a moment while they wait, and then sleep: sleeping at once is slower on idle cores, and spinning
    for a millisecond several times slower beside another program (benchmarks/waiting_threads.py)."""
    ours = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if ours:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    collects = gc.isenabled()  # not inside another
    gc.disable()
    try:
        yield
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]  # read by now; actors of a cluster have a setting of their own
        if collects:
            gc.freeze()
            gc.enable()
