"""Peak arithmetic of the device, the denominator of MFU."""

import os
import time

import numpy as np

from mindformers_ext.cpu_kernels import library

# Dense bfloat16 TFLOP/s of one Ascend 910B, as in dryrun/devices/a2.yaml, which names the sources (376 is the figure
# for float16). The vendor sells several bins: set device_peak_tflops in the YAML
# to the figure of your card.
ASCEND_910B_TFLOPS = 353.9


def threads_of(processes: int) -> int:
    """Cores that `processes` like this one use together, each with OMP_NUM_THREADS threads (default: all cores)."""
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked) * processes, cores) if asked.isdigit() else cores


def measure_cpu_tflops(threads: int, size: int = 512, repeats: int = 400) -> float:
    """Time float32 matrix products of `size` on `threads` threads and return the best TFLOP/s; takes about a second.

    Many short products of the library that our kernels call, some of which have the cores for themselves on a busy
    machine too. No operator of ours may run meanwhile.
    """
    left = np.random.default_rng(0).random((size, size), dtype=np.float32)
    out, best, before = np.empty_like(left), float("inf"), library.threads()
    library.set_threads(threads)
    for _ in range(repeats):
        start = time.perf_counter()
        library.multiply(left, left, out)
        best = min(best, time.perf_counter() - start)
    library.set_threads(before)
    return 2 * size**3 / best / 1e12


def device_peak(device_target: str, given_tflops: float | None = None, processes: int = 1) -> tuple[float, str]:
    """Return the TFLOP/s of one device and where the number comes from.

    On CPU a device is one of `processes` that share the machine: its part of what they reach together.
    """
    if given_tflops is not None:
        return float(given_tflops), "given as device_peak_tflops"
    if device_target == "CPU":
        return measure_cpu_tflops(threads_of(processes)) / processes, "measured, float32 matmul on this CPU"
    return ASCEND_910B_TFLOPS, "Ascend 910B, dense bfloat16"
