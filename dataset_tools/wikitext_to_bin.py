r"""WikiText-2/103 to Megatron .bin/.idx, with the flags of MindFormers' research/deepseek3/wikitext_to_bin.py.

    python dataset_tools/wikitext_to_bin.py --input wiki.train.tokens --output-prefix P \
        --vocab-file tokenizer.json --seq-length 4096 --workers 8

writes P_text_document.bin and .idx with samples of seq_length + 1 tokens, and P_text_document.json, the summary.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset import cli
from mindformers_ext.bin_dataset.shapes import AsIs, Pad, Stitch
from mindformers_ext.bin_dataset.text_sources import is_heading, read_wikitext


def convert(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the dataset."""
    parser = cli.text_parser(__doc__, dtype="int32")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a training sample (default 4096)")
    parser.add_argument(
        "--pad-or-stitch",
        choices=["stitch", "pad", "none"],
        default="stitch",
        help="stitch (default): all text end to end, cut into samples; pad: a document a sample, cut or filled; none: "
        "documents as they are",
    )
    parser.add_argument("--pad-token", help="token that fills short samples (default: the tokenizer's pad_token)")
    args = parser.parse_args(arguments)
    if args.seq_length < 1:
        parser.error(f"--seq-length must be at least 1, got {args.seq_length}")
    tokenizer = cli.load_tokenizer(args)
    length = args.seq_length + 1
    shape = AsIs
    if args.pad_or_stitch == "stitch":
        shape = partial(Stitch, length)
    elif args.pad_or_stitch == "pad":
        shape = partial(Pad, length, tokenizer.special_id("pad", args.pad_token))
    job = cli.text_job("wikitext_to_bin", args, tokenizer, read=read_wikitext, starts_document=is_heading, shape=shape)
    cli.run_and_report(job)


if __name__ == "__main__":
    cli.run_tool(convert)
