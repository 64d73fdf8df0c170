"""Peak arithmetic of the device, the denominator of MFU."""

import time

import numpy as np

# Dense bfloat16 TFLOP/s of one Ascend 910B. The vendor sells several bins of it: set device_peak_tflops in the YAML
# to the figure of your card.
ASCEND_910B_TFLOPS = 376.0


def measure_cpu_tflops(size: int = 1024, repeats: int = 12) -> float:
    """Time float32 matrix products of `size` on all cores and return the best TFLOP/s; takes about 0.5 s."""
    left = np.random.default_rng(0).random((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def device_peak(device_target: str, given_tflops: float | None = None) -> tuple[float, str]:
    """Return the TFLOP/s of one device and where the number comes from."""
    if given_tflops is not None:
        return float(given_tflops), "given as device_peak_tflops"
    if device_target == "CPU":
        return measure_cpu_tflops(), "measured, float32 matmul on this CPU"
    return ASCEND_910B_TFLOPS, "Ascend 910B, dense bfloat16"
