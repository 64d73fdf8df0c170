#!/usr/bin/env bash
# One machine's part of a job that Slurm, MindCluster or Volcano started, on every machine:
#   bash scripts/train_job.sh research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml output --seed 1
# What follows is run_mindformer.py's --section.key value.
# Goes on from the job's own last checkpoint where there is one. On SIGTERM, which comes before a machine is taken away,
# the run is asked to end by the file OUTPUT_DIR/kill_switch. Every machine sees OUTPUT_DIR.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

[ $# -ge 2 ] || { echo "error: give CONFIG and OUTPUT_DIR" >&2; exit 2; }
CONFIG=$1 OUTPUT_DIR=$2
shift 2
RUN=(run_mindformer.py --config "$CONFIG" --output_dir "$OUTPUT_DIR" --use_graceful_exit True)
if [ -e "$OUTPUT_DIR/checkpoint/latest" ]; then
  RUN+=(--load_checkpoint "$OUTPUT_DIR/checkpoint" --resume_training True)
fi
RUN+=("$@")
rm -f "$OUTPUT_DIR/kill_switch" # of a job that ended in another way

TOLD=
trap 'TOLD=1; mkdir -p "$OUTPUT_DIR"; touch "$OUTPUT_DIR/kill_switch"' TERM
bash "$(dirname "${BASH_SOURCE[0]}")/msrun_launcher.sh" "${RUN[*]@Q}" "" "" "" "" "" "$OUTPUT_DIR/msrun_log" &
CODE=0
wait $! || CODE=$?
while [ "$TOLD" ]; do # a signal ends a wait, not the run, which may have ended by now
  TOLD=
  CODE=0
  wait $! || CODE=$?
done
exit "$CODE"
