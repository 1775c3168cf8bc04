"""Can CUDA code be compiled against this environment's torch? If not: one line that says what is missing, exit code 1.

Looks where torch.utils.cpp_extension looks, by which flash-attn's build goes: CUDA_HOME or CUDA_PATH, the nvcc on
PATH, /usr/local/cuda. It accepts another minor version of CUDA, but no other major version.
"""

import os
import re
import subprocess
import sys

import torch
from torch.utils.cpp_extension import CUDA_HOME


def missing() -> str | None:
    needed = torch.version.cuda
    if needed is None:
        return "this torch was built without CUDA"
    if CUDA_HOME is None:
        return f"no CUDA toolkit found, and torch is built for CUDA {needed}"
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    try:
        output = subprocess.check_output([nvcc, "-V"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return f"{nvcc} does not run, and torch is built for CUDA {needed}"
    found = re.search(r"release (\d+\.\d+)", output).group(1)
    if found.split(".")[0] != needed.split(".")[0]:
        return f"{nvcc} is of CUDA {found}, and torch is built for CUDA {needed}"
    if not os.path.exists(os.path.join(CUDA_HOME, "include", "cuda_runtime.h")):
        return f"{CUDA_HOME} has nvcc but not include/cuda_runtime.h: it is not where the toolkit is"
    return None


if __name__ == "__main__":
    if line := missing():
        print(line)
        sys.exit(1)
