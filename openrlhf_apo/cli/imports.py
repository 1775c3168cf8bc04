"""Importing the libraries quickly, and as a good neighbour."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """For imports of torch and of what needs it. Garbage is not looked for meanwhile, nor in what was imported later:
    there is none, and looking takes a fifth of the time. torch's threads (libgomp, which reads the variable when it
    loads) spin for 1 ms while they wait, and then sleep. Alternated on two idle cores, the tiny run's rollouts take
    2.4 s with it, and 3.1 and 3.3 s where they sleep at once; spinning for ever would take cores that others share."""
    ours = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if ours:
        os.environ["GOMP_SPINCOUNT"] = "100000"
    gc.disable()
    try:
        yield
    finally:
        if ours:
            del os.environ["GOMP_SPINCOUNT"]  # read by now; actors of a cluster have a setting of their own
        gc.freeze()
        gc.enable()
