#!/usr/bin/env bash
# bash tests/run.sh [pytest flags]: every test, the end-to-end runs included. `-m "not slow"` leaves those out.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh cpu test
ours=(openrlhf_apo tests benchmarks examples scripts setup.py) # and not what you keep beside them
.venv/bin/ruff check "${ours[@]}"
.venv/bin/ruff format --check "${ours[@]}"
.venv/bin/mypy
# Tests and what they start share the cores: a thread that waits must not spin (test_alpha.py: 34 s with, 3 s without).
export OMP_WAIT_POLICY=PASSIVE
# Three files at a time, since they also wait, in conftest.py's order: the tests of a file share what its fixtures make.
.venv/bin/python -m pytest -q --durations=60 -n 3 --dist loadfile --no-loadscope-reorder "$@"
