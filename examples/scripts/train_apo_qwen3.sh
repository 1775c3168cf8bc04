#!/usr/bin/env bash
# bash examples/scripts/train_apo_qwen3.sh [flags of the trainer]
#
# The paper's recipe (arXiv 2512.22953): Qwen3-1.7B on MATH Level 3, P = 8, 16 prompts per optimizer step, 4 optimizer
# steps per rollout with the anchor frozen, lr 1.5e-5 cosine, 1024 new tokens, 2 epochs. All environment variables:
MODEL=${MODEL:-Qwen/Qwen3-1.7B}
DATA=${DATA:-EleutherAI/hendrycks_math} # a hub name, or a local .jsonl with problem and answer or solution
NUM_GPUS=${NUM_GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
ALPHA_MODE=${ALPHA_MODE:-guarded} # fixed, guarded, ess
SEED=${SEED:-42}
OUT=${OUT:-runs/qwen3_${ALPHA_MODE}_seed$SEED}
PYTHON=${PYTHON:-.venv/bin/python} # bash scripts/install.sh gpu makes it
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ ${NUM_GPUS//[^0-9]/} -lt 1 ]]; then
    echo "no GPU found: this recipe needs one; on a CPU run bash examples/scripts/train_apo_tiny_cpu.sh" >&2
    exit 2
fi

"$PYTHON" -m openrlhf_apo.data.math_prompts --dataset "$DATA" --level 3 --out "$OUT/data"
"$PYTHON" -m openrlhf_apo.cli.train_apo_ray --config configs/qwen3_math3.yaml --loss apo --alpha_mode "$ALPHA_MODE" \
    --actor.model_name_or_path "$MODEL" \
    --data.prompt_dataset "$OUT/data/train.jsonl" --eval.dataset "$OUT/data/eval.jsonl" \
    --actor.num_gpus_per_node "$NUM_GPUS" --vllm.num_engines "$NUM_GPUS" \
    --train.seed "$SEED" --ckpt.output_dir "$OUT" --ckpt.path "$OUT/ckpt" "$@"
"$PYTHON" -m openrlhf_apo.cli.report "$OUT"
