r"""Conversations (Alpaca, ShareGPT or messages; JSON, JSONL, parquet) to packed samples with a loss mask, as .bin/.idx.

Conversations pass through DeepSeek-V3's chat template and are packed whole into samples of --seq-length tokens.
P_text_document holds the tokens, P_text_document_loss_mask a 1 for each token of the assistant; the data loader finds
the mask by its name and learns from those tokens alone. `system` and Alpaca's `history` (learnt too) are used, an
answer with `weight` 0 or `loss` false is read but not learnt. Keys that are not supported (tools, tool_calls,
reasoning_content, ...) are refused by name where they hold anything.

    python dataset_tools/instruct_to_bin.py --input alpaca.json --output-prefix P --vocab-file tokenizer.json \
        --seq-length 4096 --pad-token '<｜end▁of▁sentence｜>'
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset import cli
from mindformers_ext.bin_dataset.conversations import ASSISTANT, BOS, EOS, USER, read_conversations
from mindformers_ext.bin_dataset.shapes import Pack
from mindformers_ext.bin_dataset.tokenizer import TokenizerError


def convert(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the dataset."""
    parser = cli.text_parser(__doc__, dtype="auto", marks=False)
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a training sample (default 4096)")
    parser.add_argument("--pad-token", help="token that fills samples (default: the tokenizer's pad_token)")
    parser.add_argument(
        "--ignore-keys", nargs="+", default=[], help="keys of rows and turns that say nothing to the model, as notes do"
    )
    args = parser.parse_args(arguments)
    if args.seq_length < 1:
        parser.error(f"--seq-length must be at least 1, got {args.seq_length}")
    tokenizer = cli.load_tokenizer(args)
    missing = [name for name in (BOS, EOS, USER, ASSISTANT) if name not in tokenizer.special_ids]
    if missing:
        raise TokenizerError(f"{tokenizer.path} lacks the chat template's tokens {missing}; use DeepSeek's tokenizer")
    shape = partial(Pack, args.seq_length, tokenizer.special_id("pad", args.pad_token))
    options = {"ignored": sorted(args.ignore_keys)}
    job = cli.text_job("instruct_to_bin", args, tokenizer, read=read_conversations, read_options=options, shape=shape)
    cli.run_and_report(job)


if __name__ == "__main__":
    cli.run_tool(convert)
