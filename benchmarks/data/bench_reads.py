"""Random sample reads a second: megatron-core 0.16.1's __getitem__ against ours, one by one, in batches and by loader.

"loader" is what MindSpore gets from BlendedMegatronDatasetDataLoader: rows of four int32 columns, one after another in
the shuffled order.

python benchmarks/data/bench_reads.py --sequence-length 4096
"""

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_index
import numpy as np
from common import alternate, child

READS, BATCH = 20_000, 512
NAMES = ("megatron", "one_by_one", "batch", "loader")
TOKENS = 100_000_000


def measure(side: str, prefix: str, sequence_length: int) -> None:
    """Warm reads of random samples in this process; prints reads per second."""
    bench_index.SEQUENCE_LENGTH = sequence_length
    build = bench_index.build_megatron if side == "megatron" else bench_index.build_ours
    with tempfile.TemporaryDirectory(dir=Path(prefix).parent) as cache:
        dataset = build(prefix, TOKENS // sequence_length - 10, cache)()
        chosen = np.random.default_rng(0).integers(0, len(dataset), READS)
        if side == "batch":

            def read() -> None:
                for start in range(0, READS, BATCH):
                    dataset.batch(chosen[start : start + BATCH])
        elif side == "loader":
            from mindformers_ext.bin_dataset.sample_order import LeftOut
            from mindformers_ext.data.megatron_dataloader import COLUMNS, SampleSource

            source = SampleSource(dataset, list(COLUMNS[:4]), 0, LeftOut([], len(dataset)))

            def read() -> None:
                for index in range(READS):
                    source[index % len(source)]
        else:

            def read() -> None:
                for index in chosen.tolist():
                    dataset[index]

        read()
        started = time.perf_counter()
        read()
        print(json.dumps({"reads": READS / (time.perf_counter() - started)}))


def main() -> None:
    """Compare the ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the corpus is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        prefix = f"{folder}/corpus"
        bench_index.make_corpus(prefix, TOKENS)
        size = Path(f"{prefix}.bin").stat().st_size // 2
        np.random.default_rng(1).integers(0, 60000, size, dtype=np.uint16).tofile(f"{prefix}.bin")
        sides = {name: partial(child, __file__, name, prefix, args.sequence_length) for name in NAMES}
        medians = alternate(sides, args.repeats)
    base = medians["megatron"]["reads"]
    for name in NAMES:
        print(f"{name:<12} {medians[name]['reads']:>10.0f} samples/s {medians[name]['reads'] / base:>6.1f}x")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in NAMES:
        measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
