"""Build a GPTDataset from a cold cache: megatron-core 0.16.1 against ours, time and extra peak memory.

    python benchmarks/data/bench_index.py --tokens 1e9 1e10 --epochs 1 3

Documents have 800 tokens on average; the .bin is a sparse file, building reads the .idx only.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from common import alternate, child

SEQUENCE_LENGTH = 4096


def make_corpus(prefix: str, tokens: int) -> None:
    """An index of random lengths that sum to about ``tokens``, and a sparse token file (uint16)."""
    from mindformers_ext.bin_dataset.indexed_dataset import HEADER, MAGIC, VERSION

    documents = tokens // 800
    lengths = np.random.default_rng(0).integers(1, 1600, documents, dtype=np.int32)
    pointers = np.zeros(documents, np.int64)
    np.cumsum(lengths[:-1] * np.int64(2), out=pointers[1:])
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for array in (lengths, pointers, np.arange(documents + 1)):
            file.write(array.data)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(int(pointers[-1]) + 2 * int(lengths[-1]))


def build_ours(prefix: str, samples: int, cache: str) -> Callable[[], Sized]:
    """A function that builds our dataset; imports are done."""
    from mindformers_ext.bin_dataset.gpt_dataset import GPTDataset, GPTDatasetConfig
    from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset

    config = GPTDatasetConfig(sequence_length=SEQUENCE_LENGTH, path_to_cache=cache)
    return lambda: GPTDataset(IndexedDataset(prefix), config, samples)


def build_megatron(prefix: str, samples: int, cache: str) -> Callable[[], Sized]:
    """A function that builds megatron-core's dataset; imports are done."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad, unique_identifiers = 100, 0, -1, {}

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE_LENGTH,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )

    def build() -> GPTDataset:
        indexed = IndexedDataset(prefix)
        documents = np.arange(len(indexed), dtype=np.int32)
        return GPTDataset(indexed, prefix, documents, samples, Split.train, config)

    return build


def memory_mb(name: str) -> float:
    """A line of /proc/self/status."""
    status = Path("/proc/self/status").read_text().split("\n")
    return next(int(line.split()[1]) for line in status if line.startswith(f"{name}:")) / 1024


def measure(side: str, prefix: str, epochs: int) -> None:
    """One cold build in this process; prints seconds and extra peak memory in MB."""
    tokens = Path(f"{prefix}.bin").stat().st_size // 2
    samples = (tokens * epochs - 1) // SEQUENCE_LENGTH
    with tempfile.TemporaryDirectory(dir=Path(prefix).parent) as cache:
        build = (build_ours if side == "ours" else build_megatron)(prefix, samples, cache)
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from what is used now.
        before = memory_mb("VmRSS")
        started = time.perf_counter()
        dataset = build()
        seconds = time.perf_counter() - started
        extra = memory_mb("VmHWM") - before
        print(json.dumps({"seconds": seconds, "memory_mb": extra, "samples": len(dataset)}))


def main() -> None:
    """Compare both sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=float, default=[1e9, 1e10])
    parser.add_argument("--epochs", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the corpora are made")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(dir=args.folder)
    print("tokens   epochs  megatron-core s / MB     ours s / MB    faster  memory")
    for tokens in args.tokens:
        prefix = f"{folder}/corpus"
        make_corpus(prefix, int(tokens))
        for epochs in args.epochs:
            sides = {name: partial(child, __file__, name, prefix, epochs) for name in ("megatron", "ours")}
            medians = alternate(sides, args.repeats)
            theirs, ours = medians["megatron"], medians["ours"]
            assert theirs["samples"] == ours["samples"]
            print(
                f"{tokens:.0e} {epochs:>6} {theirs['seconds']:>13.2f} / {theirs['memory_mb']:<6.0f}"
                f"{ours['seconds']:>10.3f} / {ours['memory_mb']:<6.0f}"
                f"{theirs['seconds'] / ours['seconds']:>6.1f}x {ours['memory_mb'] / theirs['memory_mb']:>6.2f}",
                flush=True,
            )
    shutil.rmtree(folder)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ("ours", "megatron"):
        measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
