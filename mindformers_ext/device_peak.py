"""Peak arithmetic of the device, the denominator of MFU."""

import ctypes
import os
import time
from pathlib import Path

import numpy as np
import scipy_openblas32

# Dense bfloat16 TFLOP/s of one Ascend 910B, as in dryrun/atlas_800t_a2.yaml, which names the sources (376 is the figure
# for float16). The vendor sells several bins: set device_peak_tflops in the YAML
# to the figure of your card.
ASCEND_910B_TFLOPS = 353.9


ROW_MAJOR, NOT_TRANSPOSED = 101, 111  # cblas.h


def threads_of(processes: int) -> int:
    """Cores that `processes` like this one use together, each with OMP_NUM_THREADS threads (default: all cores)."""
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(int(asked) * processes, cores) if asked.isdigit() else cores


def measure_cpu_tflops(threads: int, size: int = 512, repeats: int = 400) -> float:
    """Time float32 matrix products of `size` on `threads` threads and return the best TFLOP/s; takes about a second.

    Many short products, some of which have the cores for themselves on a busy machine too. By OpenBLAS of
    scipy-openblas32, which our kernels call; numpy's own is older and slower.
    """
    name = f"lib{scipy_openblas32.get_library()}.so"
    library = ctypes.CDLL(str(Path(scipy_openblas32.get_lib_dir()) / name))
    left = np.random.default_rng(0).random((size, size), dtype=np.float32)
    out = np.empty_like(left)
    matrix, width = left.ctypes.data_as(ctypes.c_void_p), ctypes.c_int(size)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    before = library.scipy_openblas_get_num_threads()
    library.scipy_openblas_set_num_threads(threads)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        library.scipy_cblas_sgemm(
            *(ROW_MAJOR, NOT_TRANSPOSED, NOT_TRANSPOSED, width, width, width, one, matrix, width, matrix, width),
            *(zero, out.ctypes.data_as(ctypes.c_void_p), width),
        )
        best = min(best, time.perf_counter() - start)
    library.scipy_openblas_set_num_threads(before)
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
