"""Entropy of the token frequencies of a Megatron .bin/.idx pair: the loss of a model that knows only how often each
token occurs. A model that has learned anything about the text is below it.

    python dataset_tools/unigram_entropy.py output/sample/sample_text_document output/metrics.jsonl

With a run's metrics the last main loss is compared; exit code 1 if it is not below the entropy.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset
from mindformers_ext.errors import exit_code_of


def unigram_entropy(tokens: np.ndarray) -> float:
    """Entropy in nats of the empirical distribution of token ids (N,)."""
    counts = np.bincount(tokens)
    share = counts[counts > 0] / len(tokens)
    return float(-(share * np.log(share)).sum())


def main() -> int:
    """Print the entropy of the pair named on the command line, and how a run compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="of the .bin/.idx pair")
    parser.add_argument("metrics", nargs="?", type=Path, help="a run's metrics.jsonl")
    options = parser.parse_args()
    try:
        tokens = IndexedDataset(options.prefix).tokens
        lines = options.metrics.read_text(encoding="utf-8").splitlines() if options.metrics else []
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    entropy = unigram_entropy(tokens)
    print(f"unigram entropy of the corpus: {entropy:.4f} nats per token, {len(tokens):,} tokens")
    if not lines:
        return 0
    loss = json.loads(lines[-1])["main_loss"]
    print(f"the last main loss, {loss:.4f}, is {'below' if loss < entropy else 'NOT below'} it")
    return int(loss >= entropy)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
