#!/usr/bin/env bash
# Build an image: bash docker/build.sh cpu|ascend [TAG]
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${1:-}
[ "$TARGET" = cpu ] || [ "$TARGET" = ascend ] || { echo "error: give cpu or ascend, not '$TARGET'" >&2; exit 2; }
# shellcheck source=versions.env
source "$ROOT/docker/versions.env"
exec docker build --file "$ROOT/docker/Dockerfile.$TARGET" --tag "${2:-deepseek3-mindspore:$TARGET}" \
  --build-arg PYTHON_IMAGE="$PYTHON_IMAGE" --build-arg ASCEND_IMAGE="$ASCEND_IMAGE" "$ROOT"
