#!/usr/bin/env bash
# bash scripts/figures.sh: every picture of the README and of docs/, made anew. A quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=1 OUT=runs/figures/tiny bash examples/scripts/train_apo_tiny_cpu.sh
cp runs/figures/tiny/report.png docs/tiny_run.png
.venv/bin/python -m openrlhf_apo.cli.compare configs/compare/figure1_tiny.yaml
cp runs/compare/figure1_tiny/figure_reward.png docs/figure1_tiny.png
.venv/bin/python scripts/evidence.py # docs/evidence.png, of docs/evidence/*.csv
