"""A corpus of many shards: time and memory to its first batch, cold and cached, and what 10^13 tokens would take.

    python benchmarks/data/bench_shards.py --tokens 1e9 1e10 --shards 100 1000

The .bin files are sparse. Each start is a process of its own; memory is what it holds beyond its imports (peak
resident set, of which mapped files may be dropped again).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from bench_index import SEQUENCE_LENGTH, make_corpus

ON_PAPER = 1e13, 10_000  # tokens and shards


def start(folder: str) -> dict[str, float]:
    """Seconds to the first batch, and MiB, of this process."""
    from mindformers_ext.bin_dataset.blended_dataset import build_datasets
    from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig

    prefixes = sorted(path.removesuffix(".idx") for path in map(str, Path(folder).glob("*.idx")))
    config = GPTDatasetConfig(sequence_length=SEQUENCE_LENGTH, path_to_cache=f"{folder}/cache")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dataset = build_datasets(config, [None, 0, 0], None, (prefixes, None, None))[0]
    dataset.batch(np.arange(8))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def measured(tokens: int, shards: int) -> dict[str, dict[str, float]]:
    """A first start, which builds the indices, and a second one, which finds them."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(shards):
            make_corpus(f"{folder}/{number:05d}", tokens // shards)
        command = [sys.executable, __file__, "--start", folder]
        outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
        cold, warm = map(json.loads, outputs)
        return {"cold": cold, "warm": warm}


def main() -> None:
    """Print a line for each size, and the largest one carried to ON_PAPER in proportion to its tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=float, default=[1e9, 1e10])
    parser.add_argument("--shards", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start)))
        return
    for tokens, shards in zip(args.tokens, args.shards, strict=True):
        found = measured(int(tokens), shards)
        for kind, result in found.items():
            print(f"{tokens:.0e} tokens in {shards} shards, {kind}: {result['seconds']:.2f} s, {result['mib']:.0f} MiB")
    factor = ON_PAPER[0] / args.tokens[-1]
    for kind, result in found.items():
        print(
            f"{ON_PAPER[0]:.0e} tokens in {ON_PAPER[1]} shards, {kind}, in proportion: "
            f"{result['seconds'] * factor:.0f} s, {result['mib'] * factor / 1024:.0f} GiB"
        )


if __name__ == "__main__":
    main()
