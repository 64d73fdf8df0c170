"""Train a byte-level BPE tokenizer.json with the `tokenizers` library; the same text gives the same file.

    python dataset_tools/train_tokenizer.py --input corpus.txt --output tokenizer.json --vocab-size 4096

Ids 0 to 3 are DeepSeek-V3's special tokens.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mindformers_ext.bin_dataset.chat_template import NEEDED
from mindformers_ext.errors import exit_code_of
from mindformers_ext.files.atomic import write_text


def train(files: list[str], vocab_size: int) -> Tokenizer:
    """Learn merges from the files until there are `vocab_size` tokens, or no pair occurs twice."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(NEEDED),  # ids 0 to 3: DeepSeek-V3 has the same words
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train(files, trainer)
    return tokenizer


def main() -> int:
    """Train and save; bad arguments are one sentence on standard error and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, nargs="+", help="UTF-8 text files")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--vocab-size", type=int, default=4096, help="at least 260: 256 bytes and four special tokens")
    args = parser.parse_args()
    missing = [file for file in args.input if not Path(file).is_file()]
    if missing:
        print(f"error: --input {missing[0]} does not exist", file=sys.stderr)
        return 2
    if args.vocab_size < 260:
        print(f"error: --vocab-size is {args.vocab_size}, but must be at least 260", file=sys.stderr)
        return 2
    tokenizer = train(args.input, args.vocab_size)
    write_text(args.output, tokenizer.to_str(pretty=True))  # the library's own errors of writing are no OSError
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
