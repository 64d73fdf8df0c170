"""Entropy of the token frequencies of a Megatron .bin/.idx pair: the loss of a model that knows only how often each
token occurs. A model that has learned anything about the text is below it.

    python dataset_tools/unigram_entropy.py output/sample/sample_text_document
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution of token ids (N,)."""
    counts = np.bincount(tokens)
    share = counts[counts > 0] / len(tokens)
    return float(-(share * np.log(share)).sum())


def main() -> int:
    """Print the entropy of the pair named on the command line."""
    if len(sys.argv) != 2:
        print("error: give the prefix of one .bin/.idx pair", file=sys.stderr)
        return 2
    try:
        tokens = IndexedDataset(sys.argv[1]).tokens
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"unigram entropy of the corpus: {unigram_entropy(tokens):.4f} nats per token, {len(tokens):,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
