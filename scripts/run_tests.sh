#!/usr/bin/env bash
# Set up what is missing and run the default tests:
#   bash scripts/run_tests.sh tests/data -x
#   bash scripts/run_tests.sh --mindspore 2.10.0
# --no-venv uses the current environment; --mindspore tests a copy of the project on another MindSpore, with its own
# extensions, in .venv-mindspore-VERSION. All other arguments are pytest's.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
INSTALL=(--test)
if [ "${1:-}" = --no-venv ]; then
  INSTALL+=(--no-venv)
  shift
elif [ "${1:-}" = --mindspore ]; then
  VERSION=${2:?--mindspore needs a version}
  INSTALL+=(--mindspore "$VERSION")
  shift 2
  COPY=$ROOT/.venv-mindspore-$VERSION/project
  mkdir -p "$COPY"
  find "$COPY" -name .venv -prune -o -name build -prune -o -type f ! -name '*.so' -exec rm {} + # what this project lost
  git ls-files -z --cached --others --exclude-standard | grep -zvxFf <(git ls-files --deleted) |
    xargs -0 cp --parents --preserve --target-directory "$COPY"
  ROOT=$COPY
  cd "$ROOT"
fi
bash scripts/install.sh "${INSTALL[@]}"
[ "${INSTALL[1]:-}" = --no-venv ] || PATH=$ROOT/.venv/bin:$PATH
# Where bytecode is forbidden, each of the many processes would compile MindFormers' sources again, nine seconds each.
unset PYTHONDONTWRITEBYTECODE
export GLOG_v=${GLOG_v:-3}
python -m pytest "$@"
