"""Seconds of dataset_tools/which_documents.py over 10^9 tokens, process and imports included:

python benchmarks/data/bench_which_documents.py [--tokens 1e9] [--runs 5]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_index import SEQUENCE_LENGTH, make_corpus

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, default=1e9)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "corpus")
        make_corpus(prefix, int(args.tokens))
        samples = int(args.tokens) // SEQUENCE_LENGTH
        options = {
            "config": ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml",
            "step": samples // 8,
            "model.model_config.seq_length": SEQUENCE_LENGTH,
            "train_dataset.data_loader.config.seq_length": SEQUENCE_LENGTH,
            "train_dataset.data_loader.config.split": "1, 0, 0",
            "train_dataset.data_loader.config.data_path": json.dumps(["1", prefix]),
            "train_dataset.data_loader.sizes": f"[{samples}, 0, 0]",
        }
        words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        walls, processors = [], []
        for _ in range(args.runs):
            begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, str(ROOT / "dataset_tools/which_documents.py"), *words]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            now = resource.getrusage(resource.RUSAGE_CHILDREN)
            walls.append(time.perf_counter() - begin)
            processors.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
        print(found, end="")
        print(f"{statistics.median(walls):.2f} s, {statistics.median(processors):.2f} s of processor")


if __name__ == "__main__":
    main()
