#!/usr/bin/env bash
# Install the project: a virtual environment .venv, the pinned dependencies of pyproject.toml, the C++ extensions.
#   bash scripts/install.sh --test
# --no-venv installs into the current environment, --test adds what the tests need, --mindspore VERSION takes another
# MindSpore than pyproject.toml names. Nothing is done twice: the state is a checksum of pyproject.toml, setup.py and the
# C++ sources.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=yes
EXTRA=
MINDSPORE=
while [ $# -gt 0 ]; do
  case $1 in
    --no-venv) VENV=no ;;
    --test) EXTRA="[test]" ;;
    --mindspore) MINDSPORE=${2:?--mindspore needs a version}; shift ;;
    *) echo "error: unknown argument '$1'; known are --no-venv, --test and --mindspore VERSION" >&2; exit 2 ;;
  esac
  shift
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

PREFIX=$("$PYTHON" -c 'import sys; print(sys.prefix)')
STATE=$(cat pyproject.toml setup.py $(find mindformers_ext -name '*.cc' -o -name '*.h' | sort) <(echo "$ROOT${MINDSPORE:+ $MINDSPORE}") | sha256sum | cut -c1-16)
STAMP=$PREFIX/.deepseek3-mindspore-$STATE
if [ -e "$STAMP" ] && { [ -z "$EXTRA" ] || [ -e "$STAMP-test" ]; }; then
  exit 0
fi
command -v g++ > /dev/null || { echo "error: g++ is not installed; the data loader's extension needs it" >&2; exit 2; }
echo "Installing into $PREFIX ..."
pip_install() { "$PYTHON" -m pip install --quiet --no-compile --disable-pip-version-check "$@"; }
pip_install "setuptools>=68,<82" wheel "pybind11>=2.12"
# The C++ operators compile against MindSpore's headers, so the dependencies come first.
requirements() {
  "$PYTHON" - "$EXTRA" "$MINDSPORE" <<'PY'
import importlib.metadata, re, sys, tomllib
extra, mindspore = sys.argv[1:]
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
needed = project["dependencies"] + (project["optional-dependencies"]["test"] if extra else [])
if mindspore:
    needed = [line for line in needed if not re.match("mindspore|mindformers", line)]
    needed += [f"mindspore=={mindspore}"]
    needed += [line for line in importlib.metadata.requires("mindformers") if not line.startswith("mindspore")]
print(*needed, sep="\n")
PY
}
if [ -n "$MINDSPORE" ]; then # which MindFormers would refuse
  pip_install --no-deps "$(sed -n 's/^ *"\(mindformers==.*\)",/\1/p' pyproject.toml)"
fi
pip_install --requirement <(requirements)
[ -e "$STAMP" ] || pip_install --no-build-isolation --no-deps --editable .
touch "$STAMP"
[ -z "$EXTRA" ] || touch "$STAMP-test"
