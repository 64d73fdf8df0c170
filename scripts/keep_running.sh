#!/usr/bin/env bash
# Start a training again when it dies, from its last healthy checkpoint (mindformers_ext/cpu_parallel/keep_running.py):
#   bash scripts/keep_running.sh -- python run_mindformer.py --config Y
#   bash scripts/keep_running.sh -- bash scripts/msrun_launcher.sh "run_mindformer.py --config Y" 8
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v python > /dev/null || PATH=$ROOT/.venv/bin:$PATH
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
exec python -m mindformers_ext.cpu_parallel.keep_running "$@"
