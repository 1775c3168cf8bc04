#!/usr/bin/env bash
# sbatch --nodes 2 --gpus-per-node 8 examples/launch/slurm.sh --config FILE.yaml [flags of the trainer]
#
# Submit it from the repository root, which every node must see at the same path, .venv included. It starts one Ray over
# the nodes of the allocation, and the trainer on the first of them; all ends with the job. Five minutes before the time
# limit the trainer is asked to stop: it leaves a checkpoint, from which --ckpt.load_enable goes on. Environment:
# NUM_GPUS (of a node, default those that Slurm gave; logical ones on nodes without: one per policy rank and engine).
#SBATCH --job-name=openrlhf_apo
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=B:TERM@300
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

PYTHON=$PWD/.venv/bin/python
RAY=$PWD/.venv/bin/ray
NUM_GPUS=${NUM_GPUS:-${SLURM_GPUS_ON_NODE:-}}
fail() { echo "slurm.sh: $1" >&2; exit 2; }

[[ -x $PYTHON && -f scripts/install.sh ]] ||
    fail "no .venv in $PWD: run bash scripts/install.sh there, and submit the job from there"
[[ ${NUM_GPUS:-0} =~ ^[1-9][0-9]*$ ]] ||
    fail "no GPUs in this job: give sbatch --gpus-per-node N; on nodes without GPUs set NUM_GPUS"
export PATH="$PWD/.venv/bin:$PATH" # of Ray's workers, too: DeepSpeed looks for ninja there

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=$("$PYTHON" -c 'import ray; print(ray.util.get_node_ip_address())') # of the first node, where this script runs
export RAY_ADDRESS=$host:6379
# Steps share the nodes (--overlap); they end when this script does.
start() { srun --overlap --ntasks-per-node=1 "$@" --block --num-gpus "$NUM_GPUS" --disable-usage-stats & }

start --nodes 1 --nodelist "${nodes[0]}" "$RAY" start --head --node-ip-address "$host" --port 6379 \
    --include-dashboard false
until "$RAY" health-check --address "$RAY_ADDRESS" 2>/dev/null; do
    [[ -n $(jobs -r) ]] || { echo "slurm.sh: Ray's head did not start" >&2; exit 1; }
    sleep 2
done
if [[ ${#nodes[@]} -gt 1 ]]; then
    workers=$(IFS=,; echo "${nodes[*]:1}")
    start --nodes "$((${#nodes[@]} - 1))" --nodelist "$workers" "$RAY" start --address "$RAY_ADDRESS"
    until "$PYTHON" - "${#nodes[@]}" <<<'import ray, sys
ray.init(logging_level="error")
sys.exit(sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[1]))'; do
        [[ $(jobs -r | wc -l) == 2 ]] || { echo "slurm.sh: Ray did not start on $workers" >&2; exit 1; }
        sleep 2
    done
fi

exec "$PYTHON" -m openrlhf_apo.cli.train_apo_ray "$@" # the signal is for it, and its exit code is the job's
