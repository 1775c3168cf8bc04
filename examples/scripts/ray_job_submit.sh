#!/usr/bin/env bash
# bash examples/scripts/ray_job_submit.sh --config FILE.yaml [flags of the trainer]
#
# Submits the trainer as a Ray job: joins the head at RAY_ADDRESS (a dashboard address, http://host:8265), or starts one
# here on the loopback interface and stops it again. Environment: RAY_ADDRESS, NUM_GPUS (the head's, when started
# here; logical ones without CUDA: one per policy rank and engine, default 2).
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=$PWD/.venv/bin/python
RAY=$PWD/.venv/bin/ray
export PATH="$PWD/.venv/bin:$PATH" # for the head, if started here, and its workers: DeepSpeed looks for ninja there
if [[ -z ${RAY_ADDRESS:-} ]]; then
    gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
    NUM_GPUS=${NUM_GPUS:-$((gpus > 0 ? gpus : 2))}
    RAY_ADDRESS=http://127.0.0.1:8265
    # Its agent's own port is the same for every Ray of a machine: one that is free.
    agent=$("$PYTHON" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
    # --block, so that its end takes this head along and no other: `ray stop` would end every Ray of this machine.
    "$RAY" start --head --block --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 --num-gpus "$NUM_GPUS" \
        --dashboard-agent-listen-port "$agent" \
        --num-cpus "$(($(nproc) > NUM_GPUS + 1 ? $(nproc) : NUM_GPUS + 1))" --disable-usage-stats >/dev/null &
    head=$!
    trap 'kill "$head"; wait "$head" || true' EXIT
    # The dashboard takes jobs, and the agent runs them.
    answers() { "$PYTHON" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$1" 2>/dev/null; }
    until answers "$RAY_ADDRESS/api/jobs/" && answers "http://127.0.0.1:$agent/api/local_raylet_healthz"; do
        kill -0 "$head" 2>/dev/null || { trap - EXIT; echo "Ray did not start; is another one running here?" >&2; exit 1; }
        sleep 1
    done
fi

# The job runs in this checkout, where relative paths in flags and configurations are meant; so the head, and every
# machine of the cluster, has it and its .venv at this path. Nothing is uploaded.
"$RAY" job submit --address "$RAY_ADDRESS" -- env -C "$PWD" "$PYTHON" -m openrlhf_apo.cli.train_apo_ray "$@"
