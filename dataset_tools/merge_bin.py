"""Join .bin/.idx pairs (partitions) into one, in the order given; loss masks are joined where every part has one.

python dataset_tools/merge_bin.py --input part0_text_document part1_text_document --output-prefix all_text_document
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from mindformers_ext.bin_dataset import cli, pipeline
from mindformers_ext.bin_dataset.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetWriter,
    idx_path,
    loss_mask_prefix,
)
from mindformers_ext.files.atomic import write_json


def merge(prefixes: list[str], output: str) -> None:
    """Write the concatenation of ``prefixes`` as ``output``. Raises ValueError if the parts do not fit together."""
    masks = [loss_mask_prefix(prefix) for prefix in prefixes]
    with_mask = [idx_path(mask).is_file() for mask in masks]
    if any(with_mask) and not all(with_mask):
        raise ValueError(f"{prefixes[with_mask.index(False)]} has no loss mask, other parts have; merge like with like")
    if output in prefixes:
        raise ValueError(f"--output-prefix {output} is also an input")
    join(prefixes, output)
    if all(with_mask):
        join(masks, loss_mask_prefix(output))


def join(prefixes: list[str], output: str) -> None:
    """Write the concatenation of pairs of one dtype."""
    with IndexedDatasetWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix in tqdm(prefixes, desc="merge", unit="pair"):
            writer.add_index(prefix)


def sidecar(args: argparse.Namespace, whole: IndexedDataset) -> dict[str, object]:
    """How the whole came to be: arguments, counts, and what the tools wrote beside the parts."""
    beside = [Path(f"{prefix}.json") for prefix in args.input]
    return {
        "tool": "merge_bin.py",
        "tool_version": pipeline.TOOL_VERSION,
        "arguments": vars(args),
        "counts": {"documents": whole.num_documents, "sequences": len(whole), "tokens": len(whole.tokens)},
        "parts": [json.loads(path.read_text()) if path.is_file() else None for path in beside],
    }


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line, merge and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes of the parts, without .bin/.idx")
    parser.add_argument("--output-prefix", required=True, help="prefix of the whole")
    args = parser.parse_args(arguments)
    merge(args.input, args.output_prefix)
    whole = IndexedDataset(args.output_prefix)
    write_json(f"{args.output_prefix}.json", sidecar(args, whole))
    print(
        f"merged {len(args.input)} datasets: {whole.num_documents} documents, {len(whole)} sequences, "
        f"{len(whole.tokens)} tokens in {args.output_prefix}.bin"
    )


if __name__ == "__main__":
    sys.exit(cli.main(run))
