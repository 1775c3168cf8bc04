#!/usr/bin/env bash
# bash examples/scripts/train_apo_qwen3.sh [flags of the trainer]
#
# The paper's recipe (arXiv 2512.22953): Qwen3-1.7B on MATH Level 3, P = 8, 16 prompts per optimizer step, 4 optimizer
# steps per rollout with the anchor frozen, lr 1.5e-5 cosine, 1024 new tokens, 2 epochs. All environment variables:
MODEL=${MODEL:-Qwen/Qwen3-1.7B}
DATA=${DATA:-EleutherAI/hendrycks_math} # a hub name, or a local .jsonl with problem and answer or solution
NUM_GPUS=${NUM_GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
TP=${TP:-1}                       # GPUs per vLLM engine; NUM_GPUS / TP engines share the GPUs with the policy
ATTENTION=${ATTENTION:-flash}     # flash: flash-attn on packed samples; sdpa: torch's own, on padded ones
ALPHA_MODE=${ALPHA_MODE:-guarded} # fixed, guarded, ess
SEED=${SEED:-42}
OUT=${OUT:-runs/qwen3_${ALPHA_MODE}_seed$SEED}
PYTHON=${PYTHON:-.venv/bin/python} # bash scripts/install.sh gpu makes it
set -euo pipefail
cd "$(dirname "$0")/../.."

fail() { echo "train_apo_qwen3.sh: $1" >&2; exit 2; }

[[ ${NUM_GPUS//[^0-9]/} -ge 1 ]] ||
    fail "no GPU found: this recipe needs one; on a CPU run bash examples/scripts/train_apo_tiny_cpu.sh"
[[ $TP =~ ^[1-9][0-9]*$ && $((NUM_GPUS % TP)) == 0 ]] ||
    fail "TP=$TP does not divide NUM_GPUS=$NUM_GPUS: the engines of TP GPUs each must cover all GPUs"
command -v "$PYTHON" >/dev/null || fail "no $PYTHON: bash scripts/install.sh gpu makes it"
case $ATTENTION in
    flash)
        "$PYTHON" -c 'import flash_attn' 2>/dev/null ||
            fail "flash-attn cannot be imported: FLASH_ATTN=1 bash scripts/install.sh gpu compiles it, or ATTENTION=sdpa trains without"
        attention=(--ds.attn_implementation flash_attention_2 --ds.packing_samples)
        ;;
    sdpa) attention=(--ds.attn_implementation sdpa) ;;
    *) fail "ATTENTION=$ATTENTION: flash or sdpa" ;;
esac
export PATH="$PWD/.venv/bin:$PATH" # where DeepSpeed and flashinfer find ninja, to compile their CUDA code

"$PYTHON" -m openrlhf_apo.data.math_prompts --dataset "$DATA" --level 3 --out "$OUT/data"
"$PYTHON" -m openrlhf_apo.cli.train_apo_ray --config configs/qwen3_math3.yaml --loss apo --alpha_mode "$ALPHA_MODE" \
    --actor.model_name_or_path "$MODEL" \
    --data.prompt_dataset "$OUT/data/train.jsonl" --eval.dataset "$OUT/data/eval.jsonl" \
    --actor.num_gpus_per_node "$NUM_GPUS" --vllm.num_engines "$((NUM_GPUS / TP))" --vllm.tensor_parallel_size "$TP" \
    "${attention[@]}" --train.seed "$SEED" --ckpt.output_dir "$OUT" --ckpt.path "$OUT/ckpt" "$@"
"$PYTHON" -m openrlhf_apo.cli.report "$OUT"
