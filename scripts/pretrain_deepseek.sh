#!/usr/bin/env bash
# Pretrain DeepSeek-V3 with the environment variables of Gaudi's Megatron-LM example (examples/deepseek):
#   HL_NUM_NODES=4 HL_DP=16 HL_PP=2 HL_EP=16 HL_GBS=1024 HL_NUM_LAYERS=16 bash scripts/pretrain_deepseek.sh --dry_run
# scripts/pretrain_deepseek.py says what each becomes.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v msrun > /dev/null || PATH=$ROOT/.venv/bin:$PATH
command -v python > /dev/null || { echo "error: python is not installed; run bash scripts/install.sh first" >&2; exit 2; }
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
exec python "$ROOT/scripts/pretrain_deepseek.py" "$@"
