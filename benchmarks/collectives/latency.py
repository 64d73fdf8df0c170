"""Time the shared-memory collectives: python benchmarks/collectives/latency.py [--processes 4]

Every process calls one collective back to back; printed is the time of one call on the slowest process, median and
99th percentile over the calls.
"""

import argparse
import ctypes
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mindformers_ext.collectives import collectives

SIZES = {"1 KB": 1 << 10, "64 KB": 1 << 16, "1 MB": 1 << 20, "16 MB": 1 << 24}


def operations(rank: int, size: int) -> dict:
    """{name: call(array)}; the array is what one rank puts in."""
    everyone = range(size)

    def ring(array: np.ndarray) -> None:
        collectives.send(array, (rank + 1) % size, tag=array.size)
        collectives.receive(array, (rank - 1) % size, tag=array.size)

    return {
        "AllReduce": lambda array: collectives.all_reduce(array, everyone),
        "AllGather": lambda array: collectives.all_gather(array, everyone),
        "ReduceScatter": lambda array: collectives.reduce_scatter(array, everyone),
        "AlltoAll": lambda array: collectives.all_to_all(array, everyone, 0, 0),
        "Send+Receive": ring,
    }


def keep_freed_memory() -> None:
    """Let malloc reuse large buffers as MindSpore's memory pool does, so that no page fault is timed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def measure(job: str, rank: int, size: int, seconds: float, pipe) -> None:
    keep_freed_memory()
    collectives.join(job, rank, size)
    times = {}
    for name, call in operations(rank, size).items():
        for label, bytes_ in SIZES.items():
            array = np.ones(bytes_ // 4, np.float32)
            for _ in range(3):
                call(array)
            trial = time.perf_counter()
            call(array)
            calls = max(20, int(seconds / max(1e-5, time.perf_counter() - trial)))
            calls = int(collectives.broadcast(np.array([min(calls, 5000)]), range(size), 0)[0])
            spent = np.empty(calls)
            for i in range(calls):
                start = time.perf_counter()
                call(array)
                spent[i] = time.perf_counter() - start
            times[name, label] = collectives.all_reduce(spent, range(size), "max")
    collectives.leave()
    if rank == 0:
        pipe.send(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each operation and size")
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    job = f"latency-{os.getpid()}"
    workers = [
        context.Process(target=measure, args=(job, rank, args.processes, args.seconds, writer))
        for rank in range(args.processes)
    ]
    for worker in workers:
        worker.start()
    writer.close()
    times = reader.recv()
    for worker in workers:
        worker.join()
    print(f"{args.processes} processes on {len(os.sched_getaffinity(0))} cores, float32; median / p99 ms of one call")
    print(f"{'':14}" + "".join(f"{label:>18}" for label in SIZES))
    for name in dict.fromkeys(name for name, _ in times):
        quantiles = [np.quantile(times[name, label], (0.5, 0.99)) * 1e3 for label in SIZES]
        cells = [f"{median:.3f} / {late:.3f}" for median, late in quantiles]
        print(f"{name:14}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
