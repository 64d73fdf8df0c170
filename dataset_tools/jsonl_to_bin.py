r"""JSONL (plain, .gz, .zst) or parquet to Megatron .bin/.idx, the bytes Megatron-LM's preprocess_data.py writes.

    python dataset_tools/jsonl_to_bin.py --input 'data/*.jsonl.zst' --output-prefix P --vocab-file tokenizer.json \
        --append-eod --workers 8

writes P_text_document.bin and .idx (one pair for each of --json-keys) and P_text_document.json, the summary.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset import cli


def convert(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the dataset."""
    parser = cli.text_parser(__doc__, dtype="auto")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys whose texts are written, a pair each")
    parser.add_argument(
        "--keep-sequential-samples",
        action="store_true",
        help="accepted for Megatron's command lines: the order of the input is always kept",
    )
    args = parser.parse_args(arguments)
    job = cli.text_job("jsonl_to_bin", args, cli.load_tokenizer(args), keys=tuple(args.json_keys))
    cli.run_and_report(job)


if __name__ == "__main__":
    cli.run_tool(convert)
