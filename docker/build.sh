#!/usr/bin/env bash
# Build an image, cpu or ascend:
#   bash docker/build.sh cpu deepseek3-mindspore:cpu
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${1:-}
[ "$TARGET" = cpu ] || [ "$TARGET" = ascend ] || { echo "error: give cpu or ascend, not '$TARGET'" >&2; exit 2; }
# shellcheck source=versions.env
source "$ROOT/docker/versions.env"
exec docker build --file "$ROOT/docker/Dockerfile.$TARGET" --tag "${2:-deepseek3-mindspore:$TARGET}" \
  --build-arg PYTHON_IMAGE="$PYTHON_IMAGE" --build-arg ASCEND_IMAGE="$ASCEND_IMAGE" "$ROOT"
