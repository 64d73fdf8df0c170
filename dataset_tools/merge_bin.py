"""Join .bin/.idx pairs (shards) into one, in the order given; loss masks are joined where every part has one.

    python dataset_tools/merge_bin.py --input 'P.shard-*_text_document' --output-prefix P_text_document

Parts and whole may be addresses (s3://...). Every token is read once, by many threads, and compared with the checksum
that the tool wrote beside its part. With --blend nothing is copied: P_text_document.json names the parts, and data_path
takes that file for all of them.
"""

import argparse
import glob
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.bin_dataset import cli, pipeline
from mindformers_ext.bin_dataset.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetWriter,
    loss_mask_prefix,
    manifest_of,
)
from mindformers_ext.files import remote
from mindformers_ext.files.atomic import write_json


def merge(prefixes: list[str], output: str) -> dict[str, object]:
    """Write the concatenation of ``prefixes`` as ``output``; returns what the manifest says of the files.

    Raises ValueError if the parts do not fit together, or are not what their manifests say.
    """
    masks = [loss_mask_prefix(prefix) for prefix in prefixes]
    with_mask = [remote.exists(f"{mask}.idx") for mask in masks]
    if any(with_mask) and not all(with_mask):
        raise ValueError(f"{prefixes[with_mask.index(False)]} has no loss mask, other parts have; merge like with like")
    files = join(prefixes, output)
    return files | join(masks, loss_mask_prefix(output)) if all(with_mask) else files


def join(prefixes: list[str], output: str) -> dict[str, object]:
    """Write the concatenation of pairs of one dtype."""
    with IndexedDatasetWriter(output, IndexedDataset(prefixes[0]).dtype) as writer:
        for prefix, checksum in zip(prefixes, writer.add_indices(prefixes), strict=True):
            recorded = checksum_of(prefix)
            if recorded not in (None, checksum):
                raise ValueError(f"{prefix}.bin has sha256 {checksum}, but {recorded} in its manifest; make it again")
    return {Path(output).name: writer.files}


def checksum_of(prefix: str) -> str | None:
    """The sha256 that the manifest beside a part says of its tokens; None if it says nothing, or of pieces."""
    beside = manifest_of(prefix.removesuffix(loss_mask_prefix("")))
    pieces = beside["files"][Path(prefix).name]["bin"] if beside else ()
    return pieces[0]["sha256"] if len(pieces) == 1 else None


def manifest(args: argparse.Namespace, prefixes: list[str], files: dict[str, object]) -> dict[str, object]:
    """How the whole came to be: arguments, counts, checksums, and what the tools wrote beside the parts."""
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    return {
        "tool": "merge_bin.py",
        "tool_version": pipeline.TOOL_VERSION,
        "arguments": vars(args),
        "counts": {
            "documents": sum(part.num_documents for part in parts),
            "sequences": sum(map(len, parts)),
            "tokens": sum(len(part.tokens) for part in parts),
        },
        "data_path": [absolute(prefix) for prefix in prefixes] if args.blend else None,
        "files": files,
        "parts": [manifest_of(prefix) for prefix in prefixes],
    }


def absolute(prefix: str) -> str:
    """A prefix that holds wherever a run starts."""
    return prefix if remote.is_remote(prefix) else os.path.abspath(prefix)


def parts_of(patterns: list[str]) -> list[str]:
    """Prefixes, and what patterns of them match in the order of their names."""
    found = []
    for pattern in patterns:
        matching = [path.removesuffix(".idx") for path in remote.matches(f"{pattern}.idx")]
        if not matching and glob.has_magic(pattern):
            raise ValueError(f"--input {pattern} matches no .idx file")
        found += matching or [pattern]
    shards = {int(part[1]) for prefix in found if (part := re.search(r"\.shard-\d+-of-(\d+)", prefix))}
    if shards and shards != {len(found)}:
        raise ValueError(f"--input has {len(found)} parts of {sorted(shards)} shards; finish the others first")
    return found


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line, merge and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="prefixes or patterns of the parts, without .bin/.idx; paths or addresses",
    )
    parser.add_argument("--output-prefix", required=True, help="prefix of the whole")
    parser.add_argument(
        "--blend", action="store_true", help="leave the parts where they are, and name them in one file"
    )
    args = parser.parse_args(arguments)
    prefixes = parts_of(args.input)
    if args.output_prefix in prefixes and not args.blend:
        raise ValueError(f"--output-prefix {args.output_prefix} is also an input")
    with remote.sent_to(args.output_prefix, [args.output_prefix, loss_mask_prefix(args.output_prefix)]) as output:
        facts = manifest(args, prefixes, {} if args.blend else merge(prefixes, output))
        write_json(f"{output}.json", facts)
    counts = facts["counts"]
    print(
        f"merged {len(prefixes)} datasets: {counts['documents']} documents, {counts['sequences']} sequences, "
        f"{counts['tokens']} tokens in {args.output_prefix}.{'json' if args.blend else 'bin'}"
    )


if __name__ == "__main__":
    sys.exit(cli.main(run))
