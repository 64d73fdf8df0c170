#!/usr/bin/env bash
# Start one process per device with MindSpore's msrun, with the arguments of MindFormers' launcher:
#   bash scripts/msrun_launcher.sh "run_mindformer.py --config Y ..." \
#     [WORKER_NUM [LOCAL_WORKER_NUM [MASTER_ADDR [MASTER_PORT [NODE_RANK [LOG_DIR [JOIN [CLUSTER_TIME_OUT]]]]]]]]
# MindFormers' short form WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT works too.
# On a machine without NPUs a semi-auto-parallel YAML runs too: every rank is compiled for Ascend, lowered to CPU and
# run as a process (mindformers_ext/cpu_parallel/job.py); the launcher then waits for the end, whatever JOIN says.
# The command is split into words as a shell does, but nothing in it is run or replaced: no $(...), $NAME or [0-9].
# A command without --use_parallel gets --use_parallel True. With JOIN True the exit code is the workers'.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "error: $1" >&2
  exit 2
}

is_count() {
  [[ $1 =~ ^[1-9][0-9]{0,8}$ ]]
}

[ $# -ge 1 ] || fail 'no command given; usage: msrun_launcher.sh "run_mindformer.py --config Y" [WORKER_NUM ...]'
[ $# -le 9 ] || fail "$# arguments given, at most 9 are known; quote the command as one argument"

if [ $# -eq 6 ] && [[ $5 =~ ^([Tt]rue|[Ff]alse)$ ]]; then
  set -- "$1" "$2" "$2" 127.0.0.1 "$3" 0 "$4" "$5" "$6"
fi
WORKER_NUM=${2:-8}
LOCAL_WORKER_NUM=${3:-$WORKER_NUM}
MASTER_ADDR=${4:-127.0.0.1}
MASTER_PORT=${5:-8118}
NODE_RANK=${6:-0}
LOG_DIR=${7:-output/msrun_log}
JOIN=${8:-False}
CLUSTER_TIME_OUT=${9:-7200}

is_count "$WORKER_NUM" || fail "WORKER_NUM is '$WORKER_NUM', but must be a whole number of at least 1"
is_count "$LOCAL_WORKER_NUM" || fail "LOCAL_WORKER_NUM is '$LOCAL_WORKER_NUM', but must be a whole number of at least 1"
[ "$LOCAL_WORKER_NUM" -le "$WORKER_NUM" ] ||
  fail "LOCAL_WORKER_NUM is $LOCAL_WORKER_NUM, but must not exceed WORKER_NUM $WORKER_NUM"
[ $((WORKER_NUM % LOCAL_WORKER_NUM)) -eq 0 ] ||
  fail "WORKER_NUM is $WORKER_NUM, but must be a multiple of LOCAL_WORKER_NUM $LOCAL_WORKER_NUM"
is_count "$MASTER_PORT" && [ "$MASTER_PORT" -le 65535 ] ||
  fail "MASTER_PORT is '$MASTER_PORT', but must be a number from 1 to 65535"
[[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,8})$ ]] && [ "$NODE_RANK" -lt $((WORKER_NUM / LOCAL_WORKER_NUM)) ] ||
  fail "NODE_RANK is '$NODE_RANK', but must be from 0 to $((WORKER_NUM / LOCAL_WORKER_NUM - 1)), one per machine"
[[ $JOIN =~ ^([Tt]rue|[Ff]alse)$ ]] || fail "JOIN is '$JOIN', but must be True or False"
is_count "$CLUSTER_TIME_OUT" || fail "CLUSTER_TIME_OUT is '$CLUSTER_TIME_OUT', but must be a number of seconds"

command -v msrun > /dev/null || PATH=$ROOT/.venv/bin:$PATH
command -v python > /dev/null || fail "python is not installed; run bash scripts/install.sh first"

# The first of the words says what is wrong with the command, or nothing.
mapfile -d '' WORDS < <(python -c '
import os, shlex, sys
try:
    words = ["", *shlex.split(sys.argv[1])]
except ValueError as error:
    words = [str(error)]
sys.stdout.buffer.write(b"".join(os.fsencode(word) + bytes(1) for word in words))
' "$1")
[ -z "${WORDS[0]}" ] || fail "the command cannot be split into words (${WORDS[0]}): $1"
[ ${#WORDS[@]} -gt 1 ] || fail 'no command given; usage: msrun_launcher.sh "run_mindformer.py --config Y" [WORKER_NUM ...]'
COMMAND=("${WORDS[@]:1}")
SCRIPT=${COMMAND[0]}
[ -f "$SCRIPT" ] || SCRIPT=$ROOT/$SCRIPT
[ -f "$SCRIPT" ] || fail "the command starts with '${COMMAND[0]}', which is no file here or in $ROOT"
CONFIG=
for ((i = 1; i < ${#COMMAND[@]}; i++)); do
  case ${COMMAND[i]} in
    --config) CONFIG=${COMMAND[i + 1]:-} ;;
    --config=*) CONFIG=${COMMAND[i]#--config=} ;;
    *) continue ;;
  esac
  [ -f "$CONFIG" ] || [ -f "$ROOT/$CONFIG" ] || fail "--config '$CONFIG' is no file here or in $ROOT"
done
[ -n "$CONFIG" ] || fail "the command has no --config; write \"${COMMAND[0]} --config Y ...\""
[[ " ${COMMAND[*]} " == *" --use_parallel"* ]] || COMMAND+=(--use_parallel True)

command -v msrun > /dev/null || fail "msrun is not installed; run bash scripts/install.sh first"
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
# One line says what is wrong with the YAML or the options before any process starts.
KIND=$(python -m mindformers_ext.cpu_parallel.command "${COMMAND[@]}") || exit 2

shopt -s nullglob
DEVICES=(/dev/davinci[0-9]*)
if [ ${#DEVICES[@]} -gt 0 ]; then
  [ "$LOCAL_WORKER_NUM" -le ${#DEVICES[@]} ] ||
    fail "LOCAL_WORKER_NUM is $LOCAL_WORKER_NUM, but this machine has ${#DEVICES[@]} NPUs"
  BIND_CORE=True
else
  BIND_CORE=False
  THREADS=$(($(nproc) / LOCAL_WORKER_NUM))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((THREADS > 0 ? THREADS : 1))}
fi

if [ ${#DEVICES[@]} -eq 0 ] && [ "$KIND" = one_graph ]; then
  [ "$LOCAL_WORKER_NUM" -eq "$WORKER_NUM" ] ||
    fail "LOCAL_WORKER_NUM is $LOCAL_WORKER_NUM, but without NPUs all $WORKER_NUM ranks run on one machine"
  exec python -m mindformers_ext.cpu_parallel.job --worker_num "$WORKER_NUM" --log_dir "$LOG_DIR" "${COMMAND[@]}"
fi

if [ "$NODE_RANK" -eq 0 ] && ! python - "$MASTER_PORT" <<'PYTHON'
import socket, sys
try:
    socket.socket().bind(("", int(sys.argv[1])))
except OSError:
    sys.exit(1)
PYTHON
then
  fail "MASTER_PORT $MASTER_PORT is taken or not allowed on this machine; choose another port"
fi

echo "Starting $LOCAL_WORKER_NUM of $WORKER_NUM processes; their logs are in $LOG_DIR/worker_*.log"
exec msrun --bind_core="$BIND_CORE" --worker_num="$WORKER_NUM" --local_worker_num="$LOCAL_WORKER_NUM" \
  --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --node_rank="$NODE_RANK" --log_dir="$LOG_DIR" \
  --join="$JOIN" --cluster_time_out="$CLUSTER_TIME_OUT" "$SCRIPT" "${COMMAND[@]:1}"
