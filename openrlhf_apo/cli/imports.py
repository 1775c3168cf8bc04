"""Importing the libraries quickly, and as a good neighbour."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """For imports of torch and of what needs it. Garbage is not looked for meanwhile, nor in what was imported later:
    there is none, and looking takes a fifth of the time. torch's threads, which read the variable when they load,
    sleep while they wait: spinning, they make a run several times slower on cores that it shares."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
