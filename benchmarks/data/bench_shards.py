"""A corpus of many shards: time and memory to its first batch, cold and cached, and what 10^13 tokens would take.

    python benchmarks/data/bench_shards.py --tokens 1e9 3e10 1e10 --shards 100 100 1000

The .bin files are sparse. Each start is a process of its own; memory is its own at the end beyond its imports, without
mapped files, which the system takes back when it needs the room. What a start costs is a sum: something, so much a
token, so much a shard. Three measurements give the three, and these what nobody can measure here.
"""

import argparse
import json
import re
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
    before, began = own_memory(), time.perf_counter()
    dataset = build_datasets(config, [None, 0, 0], None, (prefixes, None, None))[0]
    dataset.batch(np.arange(8))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": own_memory() - before}


def own_memory() -> float:
    """MiB of this process that are no file's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


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
    """Print a line for each size, and what they say of ON_PAPER."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=float, default=[1e9, 3e10, 1e10])
    parser.add_argument("--shards", nargs="+", type=int, default=[100, 100, 1000])
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start)))
        return
    found = [measured(int(tokens), shards) for tokens, shards in zip(args.tokens, args.shards, strict=True)]
    terms = np.array([[1, tokens, shards] for tokens, shards in zip(args.tokens, args.shards, strict=True)])
    for kind in ("cold", "warm"):
        for (_, tokens, shards), result in zip(terms, found, strict=True):
            print(line(kind, tokens, shards, result[kind]["seconds"], result[kind]["mib"]))
        costs = [[result[kind]["seconds"], result[kind]["mib"]] for result in found]
        each = np.maximum(np.linalg.lstsq(terms, costs, rcond=None)[0], 0)
        print(line(f"{kind}, on paper", *ON_PAPER, *(np.array([1, *ON_PAPER]) @ each)))


def line(kind: str, tokens: float, shards: float, seconds: float, mib: float) -> str:
    """A row of the table."""
    return f"{tokens:.0e} tokens in {shards:.0f} shards, {kind}: {seconds:.2f} s, {mib:.0f} MiB"


if __name__ == "__main__":
    main()
