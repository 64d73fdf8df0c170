#!/usr/bin/env bash
# For whoever gets a server: what of all that was proved without a card holds on it, and by how much estimates missed.
#   bash scripts/first_hour.sh --cards 8 --out output/first_hour
# Goes on where it was stopped; without a card it runs its whole way on CPU. See docs/first_hour.md.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
HERE='import importlib.util, sys; sys.exit(importlib.util.find_spec("mindspore") is None)'
command -v python > /dev/null && python -c "$HERE" || PATH=$ROOT/.venv/bin:$PATH
unset PYTHONDONTWRITEBYTECODE # else each of the many processes would compile MindSpore's sources again
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} GLOG_v=${GLOG_v:-2} # 2: MindSpore prints its peak memory
exec python -m mindformers_ext.first_hour.run "$@"
