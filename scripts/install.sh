#!/usr/bin/env bash
# Install the project: a virtual environment .venv, the pinned dependencies of pyproject.toml, the C++ extensions.
#   bash scripts/install.sh --test
# --no-venv installs into the current environment, --test adds what the tests need. Nothing is done twice: the
# state is a checksum of pyproject.toml, setup.py and the C++ sources.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=yes
EXTRA=
for argument in "$@"; do
  case $argument in
    --no-venv) VENV=no ;;
    --test) EXTRA="[test]" ;;
    *) echo "error: unknown argument '$argument'; known are --no-venv and --test" >&2; exit 2 ;;
  esac
done

PYTHON=python
if [ $VENV = yes ]; then
  PYTHON=$ROOT/.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    command -v python3.11 > /dev/null || { echo "error: python3.11 is not installed; MindFormers 1.9.0 needs it" >&2; exit 2; }
    python3.11 -m venv .venv
  fi
fi
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
  { echo "error: $("$PYTHON" --version) found, but Python 3.11 is needed" >&2; exit 2; }
command -v g++ > /dev/null || { echo "error: g++ is not installed; the data loader's extension needs it" >&2; exit 2; }

PREFIX=$("$PYTHON" -c 'import sys; print(sys.prefix)')
STATE=$(cat pyproject.toml setup.py $(find mindformers_ext -name '*.cc' -o -name '*.h' | sort) <(echo "$ROOT") | sha256sum | cut -c1-16)
STAMP=$PREFIX/.deepseek3-mindspore-$STATE
if [ -e "$STAMP" ] && { [ -z "$EXTRA" ] || [ -e "$STAMP-test" ]; }; then
  exit 0
fi
echo "Installing into $PREFIX ..."
pip_install() { "$PYTHON" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }
pip_install "setuptools>=68,<82" wheel "pybind11>=2.12"
# The C++ operators compile against MindSpore's headers, so the dependencies come first.
pip_install --requirement <("$PYTHON" - "$EXTRA" <<'PY'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *(project["optional-dependencies"]["test"] if sys.argv[1] else ()), sep="\n")
PY
)
[ -e "$STAMP" ] || pip_install --no-build-isolation --no-deps --editable .
touch "$STAMP"
[ -z "$EXTRA" ] || touch "$STAMP-test"
