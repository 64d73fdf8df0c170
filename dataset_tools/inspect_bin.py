"""Look into a .bin/.idx pair: counts, sequence lengths (text and PNG), decoded samples, checksums, full check.

    python dataset_tools/inspect_bin.py P_text_document --vocab-file tokenizer.json --samples 3

Exit status 1 and one sentence if anything in the files is inconsistent.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from mindformers_ext.bin_dataset import cli
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, bin_path, idx_path, loss_mask_prefix
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer

BAR = 40  # characters of the longest bar


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(shortest, longest, how many) for powers of two: 0, 1, 2-3, 4-7, ..."""
    classes = np.where(lengths > 0, np.frexp(lengths.astype(np.float64))[1], 0)
    counts = np.bincount(classes)
    return [((1 << k) >> 1, max((1 << k) - 1, 0), int(n)) for k, n in enumerate(counts) if n]


def histogram_text(rows: list[tuple[int, int, int]]) -> str:
    """The histogram as lines of text."""
    most = max((count for *_, count in rows), default=1)
    return "\n".join(f"{low:>9}-{high:<9} {count:>10} {'#' * -(-BAR * count // most)}" for low, high, count in rows)


def plot_histogram(rows: list[tuple[int, int, int]], path: str) -> None:
    """Save the histogram as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    axes.bar([f"{low}-{high}" for low, high, _ in rows], [count for *_, count in rows])
    axes.set(xlabel="tokens of a sequence", ylabel="sequences")
    axes.tick_params(axis="x", rotation=45)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def checksum(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.suffix) as bar:
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def report(args: argparse.Namespace) -> str:
    """Everything the tool prints. Raises CorruptDatasetError for inconsistent files."""
    dataset = IndexedDataset(args.prefix)
    tokenizer = TextTokenizer(args.vocab_file, fast=False) if args.vocab_file else None
    vocab_size = args.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    dataset.check(vocab_size)
    lengths = dataset.sequence_lengths
    rows = histogram(lengths)
    png = args.png or f"{args.prefix}.lengths.png"
    plot_histogram(rows, png)
    longest, mean = (int(lengths.max()), lengths.mean()) if len(lengths) else (0, 0.0)
    mask = loss_mask_prefix(args.prefix)
    lines = [
        f"documents  {dataset.num_documents}, {int((np.diff(dataset.document_indices) == 0).sum())} of them empty",
        f"sequences  {len(dataset)}, {mean:.1f} tokens on average, at most {longest}",
        f"tokens     {len(dataset.tokens)} of {dataset.dtype.name}",
        histogram_text(rows),
        f"histogram  {png}",
        *(f"sha256     {checksum(path(args.prefix))}  {path(args.prefix)}" for path in (bin_path, idx_path)),
    ]
    if idx_path(mask).is_file():
        learnt = IndexedDataset(mask)
        learnt.check(2)
        lines.append(f"loss mask  {int(np.count_nonzero(learnt.tokens))} of {len(learnt.tokens)} tokens are learnt")
    for index in range(min(args.samples, len(dataset))):
        ids = dataset.get(index)[: args.sample_tokens]
        lines.append(f"sample {index}: {tokenizer.decode(ids)!r}" if tokenizer else f"sample {index}: {ids.tolist()}")
    known = f"every id below {vocab_size}" if vocab_size else "ids not checked (give --vocab-file or --vocab-size)"
    return "\n".join([*lines, f"consistent: sizes, lengths, offsets and document marks agree; {known}"])


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="P of P.bin and P.idx")
    parser.add_argument("--vocab-file", help="tokenizer to decode samples and to check ids with")
    parser.add_argument("--vocab-size", type=int, help="check ids against this instead of the tokenizer's size")
    parser.add_argument("--samples", type=int, default=3, help="sequences to show")
    parser.add_argument("--sample-tokens", type=int, default=64, help="tokens to show of each")
    parser.add_argument("--png", help="where to save the histogram (default: P.lengths.png)")
    print(report(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(cli.main(run))
