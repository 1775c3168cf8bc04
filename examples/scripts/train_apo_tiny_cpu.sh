#!/usr/bin/env bash
# bash examples/scripts/train_apo_tiny_cpu.sh [flags of the trainer]
#
# The whole pipeline on a laptop without a GPU: installs, makes a tiny Qwen3-shaped base model that half knows
# arithmetic, and trains it by guarded APO, or by what --loss and --alpha_mode say. Environment: SEED (1),
# OUT (runs/tiny_seed$SEED).
set -euo pipefail
cd "$(dirname "$0")/../.."

SEED=${SEED:-1}
OUT=${OUT:-runs/tiny_seed$SEED}

bash scripts/install.sh cpu
export PATH="$PWD/.venv/bin:$PATH" # as if .venv were activated
.venv/bin/python -m openrlhf_apo.data.tiny --out .cache/tiny
.venv/bin/python -m openrlhf_apo.cli.train_apo_ray --config configs/tiny_cpu.yaml \
    --train.seed "$SEED" --ckpt.output_dir "$OUT" --ckpt.path "$OUT/ckpt" "$@"
.venv/bin/python -m openrlhf_apo.cli.report "$OUT"
