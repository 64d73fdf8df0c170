#!/usr/bin/env bash
# Tokenize many files by Slurm, one array task for every N-th file, then join the parts:
#   sbatch --array=0-15 scripts/slurm_data.sh 'data/*.jsonl' dataset/train tokenizer.json
#   sbatch --dependency=singleton --job-name=tokenize --array=0 scripts/slurm_data.sh --join dataset/train
#SBATCH --job-name=tokenize
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.log
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

cd "${PROJECT:-${SLURM_SUBMIT_DIR:-.}}"
command -v python > /dev/null || PATH=$PWD/.venv/bin:$PATH
if [ "${1:-}" = --join ]; then
  [ $# -eq 2 ] || { echo "error: give --join PREFIX" >&2; exit 2; }
  mapfile -t PARTS < <(compgen -G "$2_part*_text_document.idx" | sort | sed 's/\.idx$//')
  [ ${#PARTS[@]} -gt 0 ] || { echo "error: there is no $2_part*_text_document.idx" >&2; exit 2; }
  exec python dataset_tools/merge_bin.py --input "${PARTS[@]}" --output-prefix "$2_text_document"
fi
[ $# -eq 3 ] || { echo "error: give 'INPUT PATTERN' PREFIX TOKENIZER" >&2; exit 2; }
mapfile -t FILES < <(compgen -G "$1" | sort)
MINE=()
for ((i = SLURM_ARRAY_TASK_ID - ${SLURM_ARRAY_TASK_MIN:-0}; i < ${#FILES[@]}; i += SLURM_ARRAY_TASK_COUNT)); do
  MINE+=("${FILES[i]}")
done
[ ${#MINE[@]} -gt 0 ] || { echo "no file of $1 is left for task $SLURM_ARRAY_TASK_ID"; exit 0; }
exec python dataset_tools/jsonl_to_bin.py --input "${MINE[@]}" --vocab-file "$3" --append-eod \
  --output-prefix "$(printf '%s_part%04d' "$2" "$SLURM_ARRAY_TASK_ID")" --workers "${SLURM_CPUS_PER_TASK:-1}"
