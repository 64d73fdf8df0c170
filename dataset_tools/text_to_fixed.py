r"""A book corpus (plain text, a document a line, or JSONL/parquet) to samples of one length, as .bin/.idx.

Each document becomes begin-of-sentence + text + end-of-sentence; all are laid end to end and cut into samples of
--sequence-length tokens, as the nnScaler DeepSeek example prepares bookcorpus. What is left at the end is counted.

    python dataset_tools/text_to_fixed.py --input books.txt --output-prefix P --vocab-file tokenizer.json \
        --sequence-length 2048
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset import cli
from mindformers_ext.bin_dataset.shapes import Stitch
from mindformers_ext.bin_dataset.text_sources import find_inputs, is_text_file, read_any_text


def convert(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the dataset."""
    parser = cli.text_parser(__doc__, dtype="auto")
    parser.add_argument("--sequence-length", type=int, required=True, help="tokens of every sample")
    parser.add_argument("--json-key", default="text", help="key of the text in JSONL or parquet files")
    parser.set_defaults(append_eod=True, add_bos=True)
    args = parser.parse_args(arguments)
    if args.sequence_length < 1:
        parser.error(f"--sequence-length must be at least 1, got {args.sequence_length}")
    inputs = find_inputs(args.input)
    key = "text" if all(map(is_text_file, inputs)) else args.json_key
    job = cli.text_job(
        "text_to_fixed",
        args,
        cli.load_tokenizer(args),
        keys=(key,),
        read=read_any_text,
        shape=partial(Stitch, args.sequence_length),
    )
    cli.run_and_report(job)


if __name__ == "__main__":
    cli.run_tool(convert)
