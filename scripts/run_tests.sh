#!/usr/bin/env bash
# Set up what is missing and run the default tests:
#   bash scripts/run_tests.sh tests/data -x
# --no-venv uses the current environment; all other arguments are pytest's.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
INSTALL=(--test)
if [ "${1:-}" = --no-venv ]; then
  INSTALL+=(--no-venv)
  shift
fi
bash scripts/install.sh "${INSTALL[@]}"
[ ${#INSTALL[@]} -gt 1 ] || PATH=$ROOT/.venv/bin:$PATH
# Where bytecode is forbidden, each of the many processes would compile MindFormers' sources again, nine seconds each.
unset PYTHONDONTWRITEBYTECODE
export GLOG_v=${GLOG_v:-3}
python -m pytest "$@"
