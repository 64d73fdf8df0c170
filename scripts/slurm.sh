#!/usr/bin/env bash
# Train by Slurm, one task a machine, which starts the machine's ranks:
#   python scripts/render_job.py --config research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml --kind slurm > job.sh && sbatch job.sh
#   sbatch --nodes=4 --export=ALL,CONFIG=research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml scripts/slurm.sh
# Ten minutes before the time limit the run is asked to end (the file OUTPUT_DIR/kill_switch), and the job goes back into
# the queue. A job that starts again, also on other machines, goes on from its own last checkpoint.
#SBATCH --job-name=deepseek3
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=slurm-%j.log
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

CONFIG=${CONFIG:-research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-output}
OPTIONS=()

cd "${PROJECT:-${SLURM_SUBMIT_DIR:-.}}"
OUT_OF_TIME=
trap 'OUT_OF_TIME=1; mkdir -p "$OUTPUT_DIR"; touch "$OUTPUT_DIR/kill_switch"' USR1
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash scripts/train_job.sh "$CONFIG" "$OUTPUT_DIR" ${OPTIONS[@]+"${OPTIONS[@]}"} &
CODE=0
wait $! || CODE=$?
while kill -0 $! 2> /dev/null; do # a signal ends a wait, not the step
  CODE=0
  wait $! || CODE=$?
done
if [ -n "$OUT_OF_TIME" ]; then
  echo "the time limit is near: the job goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
