r"""Conversations (Alpaca, ShareGPT or OpenAI messages) to packed samples with a loss mask, as .bin/.idx.

Conversations (JSON, JSONL, parquet, Arrow, or hf://NAME@SPLIT of HuggingFace's hub) pass through the chat template of
tokenizer_config.json and are packed whole into samples of --seq-length tokens. P_text_document holds the tokens,
P_text_document_loss_mask a 1 for each token of the assistant; the data loader finds the mask by its name and learns
from those tokens alone. `system`, `tools`, `reasoning_content` and Alpaca's `history` (learnt too) are used, an answer
with `weight` 0 or `loss` false is read but not learnt. Keys that the template does not read are refused by name where
they hold anything.

    python dataset_tools/instruct_to_bin.py --input alpaca.json --output-prefix P --vocab-file tokenizer.json \
        --seq-length 4096 --pad-token '<｜end▁of▁sentence｜>'
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset import cli
from mindformers_ext.bin_dataset.conversation_job import ConversationOptions
from mindformers_ext.bin_dataset.conversations import LEARN
from mindformers_ext.bin_dataset.shapes import PACKING, TRUNCATION


def convert(arguments: list[str] | None = None) -> None:
    """Parse the command line and write the dataset."""
    parser = cli.text_parser(__doc__, dtype="auto", marks=False)
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a training sample (default 4096)")
    parser.add_argument("--pad-token", help="token that fills samples (default: the tokenizer's pad_token)")
    parser.add_argument("--chat-template", help="a Jinja file (default: the tokenizer's own, or DeepSeek-V3's)")
    parser.add_argument(
        "--template-arguments", type=json.loads, default={}, help='JSON of more that it reads, as {"thinking": true}'
    )
    policies = "; ".join(f"{name}: {meaning}" for name, meaning in TRUNCATION.items())
    parser.add_argument("--learn", choices=LEARN, default="all", help="all assistant turns (default), or the last one")
    parser.add_argument(
        "--truncation",
        choices=TRUNCATION,
        default="cut",
        help=policies,
    )
    parser.add_argument(
        "--packing",
        choices=PACKING,
        default="best",
        help="best: into the fullest open sample with room (default); in-order: one after another; none: one a sample",
    )
    parser.add_argument(
        "--ignore-keys", nargs="+", default=[], help="keys of rows and turns that say nothing to the model, as notes do"
    )
    args = parser.parse_args(arguments)
    if args.seq_length < 1:
        parser.error(f"--seq-length must be at least 1, got {args.seq_length}")
    tokenizer = cli.load_tokenizer(args)
    options = ConversationOptions(**{item.name: getattr(args, item.name) for item in fields(ConversationOptions)})
    cli.run_and_report(cli.text_job("instruct_to_bin", args, tokenizer, **options.job_fields(tokenizer)))


if __name__ == "__main__":
    cli.run_tool(convert)
