#!/usr/bin/env bash
# From text to a falling loss in one command: install, make a corpus, a tokenizer and Megatron files, train a small
# DeepSeek-V3 as four semi-auto-parallel ranks on CPU.
#   bash scripts/quickstart.sh --input my.txt --output-dir output
# Without --input it takes a text that Python brings; --no-venv uses the current environment. Steps whose result is there
# already are left out; with another --input they run again.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '/^set /q; s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
INPUT=
OUTPUT=output
INSTALL=()
while [ $# -gt 0 ]; do
  case $1 in
    --input) INPUT=$(realpath -m "${2:?--input needs a file}"); shift 2 ;;
    --output-dir) OUTPUT=${2:?--output-dir needs a folder}; shift 2 ;;
    --no-venv) INSTALL+=(--no-venv); shift ;;
    *) echo "error: unknown argument '$1'; known are --input FILE, --output-dir FOLDER and --no-venv" >&2; exit 2 ;;
  esac
done
[ -z "$INPUT" ] || [ -s "$INPUT" ] || { echo "error: --input $INPUT does not exist or is empty" >&2; exit 2; }
cd "$ROOT"
# Where bytecode is forbidden, each of the many processes would compile MindFormers' sources again, nine seconds each.
unset PYTHONDONTWRITEBYTECODE

bash scripts/install.sh "${INSTALL[@]}"
[ ${#INSTALL[@]} -gt 0 ] || PATH=$ROOT/.venv/bin:$PATH

CONFIG=research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_4p.yaml
RANKS=4
SAMPLE=$OUTPUT/sample
DONE=$SAMPLE/made_from
SOURCE=$(cat dataset_tools/make_sample_corpus.py dataset_tools/train_tokenizer.py ${INPUT:+"$INPUT"} | sha256sum)
if [ ! -e "$DONE" ] || [ "$(cat "$DONE")" != "$SOURCE" ]; then
  rm -rf "$SAMPLE" "$OUTPUT/summary.txt"
  if [ -n "$INPUT" ]; then # your own text, as it is
    CORPUS=$SAMPLE/corpus.jsonl
    TO_BIN=(jsonl_to_bin.py)
    python dataset_tools/make_sample_corpus.py --input "$INPUT" --output "$CORPUS"
  else
    CORPUS=$SAMPLE/corpus.txt
    TO_BIN=(wikitext_to_bin.py --seq-length 256 --pad-or-stitch none)
    python dataset_tools/make_sample_corpus.py --output "$CORPUS"
  fi
  python dataset_tools/train_tokenizer.py --input "${INPUT:-$CORPUS}" --output "$SAMPLE/tokenizer.json" --vocab-size 4096
  python "dataset_tools/${TO_BIN[0]}" "${TO_BIN[@]:1}" --input "$CORPUS" --output-prefix "$SAMPLE/sample" \
    --vocab-file "$SAMPLE/tokenizer.json" --append-eod --eod-token '<｜end▁of▁sentence｜>' --workers 2
  echo "$SOURCE" > "$DONE"
fi

if [ -e "$OUTPUT/summary.txt" ]; then
  echo "Already trained; remove $OUTPUT to start over."
  cat "$OUTPUT/summary.txt"
else
  echo "Training on $RANKS ranks: dp2 mp2 ep2. Compiling them takes about two minutes. Logs: $OUTPUT/msrun_log"
  COMMAND=(run_mindformer.py --config "$CONFIG" --output_dir "$OUTPUT"
    --train_dataset.data_loader.config.data_path "['1', '$SAMPLE/sample_text_document']"
    --processor.tokenizer.tokenizer_file "$SAMPLE/tokenizer.json")
  COMMAND_LINE=$(python -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "${COMMAND[@]}")
  bash scripts/msrun_launcher.sh "$COMMAND_LINE" $RANKS $RANKS 127.0.0.1 8118 0 "$OUTPUT/msrun_log"
  cat "$OUTPUT/summary.txt"
fi
python dataset_tools/unigram_entropy.py "$SAMPLE/sample_text_document" "$OUTPUT/metrics.jsonl"
