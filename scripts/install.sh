#!/usr/bin/env bash
# bash scripts/install.sh cpu|gpu [test]: makes .venv in the repository root with everything pinned. A re-run is a no-op.
#
# Environment: PYTHON         the Python 3.11 to use (default python3.11, else python3)
#              TORCH_INDEX_URL an index with CPU builds of torch, where the default one has only CUDA builds
#              FLASH_ATTN     gpu: 1 compiles flash-attn (default; about an hour, needs a CUDA toolkit), 0 leaves it out
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "install.sh: $1" >&2; exit 2; }
say() { echo "install.sh: $1" >&2; }

kind=${1:-}
extra=${2:-}
FLASH_ATTN=${FLASH_ATTN:-1}
[[ $kind == cpu || $kind == gpu ]] || fail "say which: bash scripts/install.sh cpu, or gpu"
[[ -z $extra || $extra == test ]] || fail "unknown extra '$extra': only 'test'"
[[ $FLASH_ATTN == 0 || $FLASH_ATTN == 1 ]] || fail "FLASH_ATTN=$FLASH_ATTN: 1 compiles flash-attn, 0 leaves it out"

stamp=.venv/.installed-$kind
state=$(cat requirements/{cpu,gpu,test}.txt requirements/cpu.lock scripts/install.sh setup.py pyproject.toml | sha256sum | cut -d' ' -f1)
[[ $kind == cpu ]] || state+=" flash-attn $FLASH_ATTN"
done_with() { [[ -f $1 && $(cat "$1") == "$state" ]]; }

if ! done_with "$stamp"; then
    python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
    [[ -n $python ]] || fail "no Python found: install Python 3.11 or set PYTHON"
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || fail "$python is not Python 3.11: set PYTHON"
    [[ $(uname -m) == x86_64 || $kind == gpu ]] || fail "the CPU build of vLLM needs x86-64, this is $(uname -m)"
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    export PATH="$PWD/.venv/bin:$PATH" # where builds find ninja
    pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)

    if [[ $kind == cpu ]]; then
        say "torch"
        "${pip[@]}" torch==2.13.0 ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
        [[ $(.venv/bin/python -c 'import torch; print(torch.version.cuda)' 2>/dev/null) == None ]] ||
            say "the default index gave a CUDA build of torch; it works, and TORCH_INDEX_URL can name an index of CPU builds"
    else
        say "vLLM, which chooses torch"
        "${pip[@]}" vllm==0.29.0
        # Asked before anything is compiled; torch has to be there to ask.
        [[ $FLASH_ATTN == 0 ]] || missing=$(.venv/bin/python scripts/cuda_toolkit.py 2>/dev/null) ||
            fail "flash-attn cannot be compiled: $missing; set CUDA_HOME to that toolkit, or leave flash-attn out with FLASH_ATTN=0 and train with ATTENTION=sdpa"
    fi
    "${pip[@]}" setuptools==77.0.3 wheel packaging

    # openrlhf goes in bare: its metadata demands flash-attn, which only builds with CUDA.
    if [[ $kind == cpu ]]; then
        say "vLLM, Ray, transformers and the rest"
        "${pip[@]}" --no-deps -r requirements/cpu.lock
    else
        say "Ray, transformers and the rest"
        "${pip[@]}" -r requirements/gpu.txt
        "${pip[@]}" --no-deps openrlhf==0.11.2
    fi
    # In a build of its own that has no torch: beside a GPU and a torch with CUDA, its setup.py runs nvcc.
    say "DeepSpeed"
    DS_BUILD_OPS=0 "${pip[@]}" --no-deps --use-pep517 deepspeed==0.19.6
    if [[ $kind == gpu && $FLASH_ATTN == 1 ]]; then
        say "flash-attn: no wheel fits this torch, so it is compiled now, which takes about an hour (FLASH_ATTN=0 leaves it out)"
        .venv/bin/python -m pip install --disable-pip-version-check --no-build-isolation flash-attn==2.8.3
    fi
    "${pip[@]}" --no-deps --no-build-isolation --editable .
    echo "$state" > "$stamp"
    say "installed in .venv"
else
    say ".venv is up to date"
fi

if [[ $extra == test ]] && ! done_with .venv/.installed-test; then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
    echo "$state" > .venv/.installed-test
fi
