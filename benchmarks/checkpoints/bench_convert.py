"""Speed of convert_weight.py, bfloat16 to bfloat16, against a plain copy of the same folder on the same disk.

    python benchmarks/checkpoints/bench_convert.py --folder /data/scratch [--gigabytes 4] [--repeats 5] [--workers 2]

Makes a V3 folder of random weights with the released model's expert shapes, then copies and converts it in turn; both
sides wait for the disk (fsync), and both find the source in the page cache. Prints medians and the peak memory of the
conversion (its own process).
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "research/deepseek3")]

import convert_weight  # noqa: E402 (after the project is on the path)
from hf_config import config_from_hf, config_to_hf  # noqa: E402
from weights import name_table  # noqa: E402

from mindformers_ext.files.atomic import flush  # noqa: E402
from mindformers_ext.files.safetensors_format import DTYPES, Output, write_folder  # noqa: E402


def make_source(folder: Path, gigabytes: float) -> None:
    """A one-layer V3 of the released widths, with as many experts as make up the size."""
    from deepseek3_config import DeepseekV3Config

    experts = max(int(gigabytes * 1e9 / (3 * 7168 * 2048 * 2)), 2)
    moe = dict(expert_num=experts, num_experts_chosen=2, shared_expert_num=1, moe_intermediate_size=2048, use_gmm=True)
    config = DeepseekV3Config(num_layers=1, vocab_size=4096, mtp_depth=0, moe_config=moe)
    values = config_to_hf(config, 0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values))
    config = config_from_hf(values, 0)
    noise = np.random.default_rng(0).integers(0x3C00, 0x3D00, 7168 * 18432, np.uint16)

    def tensor(name: str, shape: tuple[int, ...]) -> Output:
        kind = np.dtype(np.float32 if name.endswith("bias") else DTYPES["BF16"])
        size = int(np.prod(shape))
        values = np.zeros(shape, kind) if name.endswith("bias") else noise[:size].view(kind).reshape(shape)
        return Output(name, shape, kind, [lambda: values])

    outputs = [tensor(name, entry.their_shape) for entry in name_table(config) for name in entry.theirs]
    write_folder(folder, outputs, "model", "benchmark", {"format": "pt"}, 1, shard_bytes=10**9)


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy, on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        flush(file)
    return time.perf_counter() - start


def convert(source: Path, target: Path, workers: int) -> float:
    """Seconds of the conversion, which waits for the disk itself."""
    start = time.perf_counter()
    convert_weight.convert(["--input", str(source), "--output", str(target), "--workers", str(workers)])
    return time.perf_counter() - start


def peak_memory(source: Path, target: Path, workers: int) -> tuple[float, float]:
    """Peak memory in GB of a conversion in a process of its own, and of the same process without work."""
    command = [sys.executable, str(ROOT / "research/deepseek3/convert_weight.py"), "--input", str(source)]
    peaks = []
    for rest in (["--only-names"], ["--output", str(target), "--workers", str(workers)]):
        subprocess.run([*command, *rest], capture_output=True, check=True)
        peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6)
    return peaks[1], peaks[0]


def main() -> None:
    """Alternate both sides and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work; removed afterwards")
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the source")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    work = args.folder / "bench_convert"
    shutil.rmtree(work, ignore_errors=True)
    source = work / "source"
    try:
        make_source(source, args.gigabytes)
        size = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        largest = max(file.stat().st_size for file in source.iterdir()) / 1e9
        seconds: dict[str, list[float]] = {"copy": [], "convert": []}
        peak, idle = peak_memory(source, work / "ours", args.workers)
        for _ in range(args.repeats):
            shutil.rmtree(work / "ours")  # its memory serves the next side: a virtual machine is slow to get new pages
            seconds["copy"].append(copy(source, work / "copy"))
            shutil.rmtree(work / "copy")
            seconds["convert"].append(convert(source, work / "ours", args.workers))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    copied, converted = (statistics.median(seconds[name]) for name in ("copy", "convert"))
    print(f"{size:.2f} GB, {args.workers} workers: copy {size / copied:.2f} GB/s, convert {size / converted:.2f} GB/s")
    print(f"conversion at {copied / converted:.0%} of a plain copy")
    print(f"peak memory {peak:.2f} GB, {idle:.2f} of it Python and libraries; largest file {largest:.2f} GB")


if __name__ == "__main__":
    main()
