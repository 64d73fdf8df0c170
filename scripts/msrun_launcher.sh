#!/usr/bin/env bash
# Start one process per device, on this machine or on this machine's part of a cluster:
#   bash scripts/msrun_launcher.sh "run_mindformer.py --config Y ..." \
#     [WORKER_NUM [LOCAL_WORKER_NUM [MASTER_ADDR [MASTER_PORT [NODE_RANK [LOG_DIR [JOIN [CLUSTER_TIME_OUT]]]]]]]]
# mindformers_ext/cluster/launcher.py says what the arguments mean, and nodes.py what a cluster may say in their place.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v msrun > /dev/null || PATH=$ROOT/.venv/bin:$PATH
command -v python > /dev/null || { echo "error: python is not installed; run bash scripts/install.sh first" >&2; exit 2; }
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
exec python -m mindformers_ext.cluster.launcher "$@"
