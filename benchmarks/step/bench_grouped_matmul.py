"""Grouped matmul against a loop over experts in torch: python benchmarks/step/bench_grouped_matmul.py

Sizes of nnScaler's DeepSeek example: hidden 2048, intermediate 1408, equal groups, float32. Printed per case: forward
and backward (both gradients) in milliseconds, median of the rounds, and the share of a large product's speed. The two
sides take turns.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
HIDDEN, WIDTH = 2048, 1408
CASES = ((4096, 64), (2048, 32), (8192, 64), (2048, 16), (16384, 64), (2048, 8))  # (tokens, experts)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def our_calls(x: np.ndarray, weight: np.ndarray, gradient: np.ndarray, ends: np.ndarray) -> list[Callable]:
    """Forward and backward on our kernels."""
    import mindspore as ms
    from mindspore import nn

    from mindformers_ext.cpu_kernels.library import custom

    # In graph mode, as training runs: in PyNative mode Python's thread waits on a core of its own.
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", memory_optimize_level="O1")
    product = custom("GroupedMatmul", lambda x, w, e: (x[0], w[2]), lambda x, w, e: x)
    input_grad = custom("GroupedMatmulInputGrad", lambda d, w, e: (d[0], w[1]), lambda d, w, e: d)
    weight_grad = custom("GroupedMatmulWeightGrad", lambda x, d, e: (e[0], x[1], d[1]), lambda x, d, e: x)

    class Backward(nn.Cell):
        def construct(self, x, weight, gradient, ends):
            return input_grad(gradient, weight, ends), weight_grad(x, gradient, ends)

    x, weight, gradient, ends = (ms.Tensor(array) for array in (x, weight, gradient, ends))
    gradients = Backward()

    def forward():
        product(x, weight, ends).asnumpy()  # waits for the result

    def backward():
        dx, dweight = gradients(x, weight, gradient, ends)
        dx.asnumpy(), dweight.asnumpy()

    return [forward, backward]


def torch_calls(x: np.ndarray, weight: np.ndarray, gradient: np.ndarray, ends: np.ndarray) -> list[Callable]:
    """Forward and backward as a Python loop over experts."""
    x, weight, gradient = (torch.from_numpy(array) for array in (x, weight, gradient))
    groups = list(zip([0, *ends[:-1]], ends, strict=True))

    def forward():
        return torch.cat([x[first:end] @ weight[e] for e, (first, end) in enumerate(groups)])

    def backward():
        dx = torch.cat([gradient[first:end] @ weight[e].T for e, (first, end) in enumerate(groups)])
        return dx, torch.stack([x[first:end].T @ gradient[first:end] for first, end in groups])

    return [forward, backward]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0))))
    torch.set_num_threads(threads)
    from mindformers_ext.training.device_peak import measure_cpu_tflops

    peak = 1e12 * measure_cpu_tflops(threads)
    print(f"load {os.getloadavg()[0]:.2f}, {threads} threads, peak {peak / 1e9:.0f} GFLOP/s")
    print("tokens/experts  side    forward ms (peak)  backward ms (peak)")
    rng = np.random.default_rng(0)
    for tokens, experts in CASES:
        x, gradient = (rng.standard_normal((tokens, width), np.float32) for width in (HIDDEN, WIDTH))
        weight = rng.standard_normal((experts, HIDDEN, WIDTH), np.float32)
        ends = np.arange(1, experts + 1) * (tokens // experts)
        sides = {"torch": torch_calls(x, weight, gradient, ends), "ours": our_calls(x, weight, gradient, ends)}
        taken = {(name, i): [] for name in sides for i in (0, 1)}
        for _ in range(args.rounds + 1):
            for name, calls in sides.items():
                for i, call in enumerate(calls):
                    taken[name, i].append(timed(call))
        flops = 2 * tokens * HIDDEN * WIDTH
        for name in sides:
            forward, backward = (statistics.median(taken[name, i][1:]) for i in (0, 1))  # the first round warms up
            print(
                f"{tokens:6}/{experts:<7}  {name:6} {1e3 * forward:9.1f} ({flops / forward / peak:4.0%})"
                f"   {1e3 * backward:9.1f} ({2 * flops / backward / peak:4.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
