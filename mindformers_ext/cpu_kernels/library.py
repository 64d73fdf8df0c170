"""The compiled kernels as MindSpore operators.

Extends MindSpore 2.9.0, whose CPU backend lacks the fused operators of Ascend and refuses bfloat16 in matrix products;
it can go when MindSpore has them. Each .cc file of this folder holds one kernel with its mathematics. Imports nothing
heavy: the launcher of ranks asks for the library's path.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mindformers_ext.built_library import built_library

AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # what -march=x86-64-v4 needs


def has_avx512() -> bool:
    """True when this CPU runs the build with 512-bit vectors."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().partition("flags")[2].partition("\n")[0] if cpu.exists() else ""
    return set(flags.split()) >= AVX512


@functools.cache
def library_path() -> Path:
    """Path of the build for this CPU; raises ImportError when the project was installed without its extensions."""
    best = ("_kernels_avx512",) if has_avx512() else ()
    return built_library(Path(__file__).parent, *best, "_kernels")


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


def multiply(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
    """out = left right: square float32 matrices of one size, row after row, by the products of the kernels."""
    size = len(out)
    for matrix in (left, right, out):
        if matrix.shape != (size, size) or matrix.dtype != np.float32 or not matrix.flags.c_contiguous:
            raise ValueError("multiply takes three contiguous square float32 matrices of the same size")
    _library().cpu_kernels_multiply(
        ctypes.c_int64(size), *(ctypes.c_void_p(matrix.ctypes.data) for matrix in (left, right, out))
    )


def set_threads(count: int) -> None:
    """Compute with `count` threads from now on; results do not depend on it. Not while an operator runs."""
    _library().cpu_kernels_set_threads(count)


def threads() -> int:
    """Threads that the kernels compute with."""
    return _library().cpu_kernels_threads()


@functools.cache
def _fit_threads() -> None:
    """Use OMP_NUM_THREADS or all cores, at most MindSpore's runtime_num_threads."""
    import mindspore as ms

    asked = os.environ.get("OMP_NUM_THREADS", "")
    count = int(asked) if asked.isdigit() and int(asked) > 0 else len(os.sched_getaffinity(0))
    set_threads(min(count, ms.get_context("runtime_num_threads")))


def custom(
    name: str, shapes: Callable, types: Callable | None = None, bprop: Callable | None = None, **attributes: float
):
    """The operator `name` of the library.

    Args:
        shapes: the outputs' shapes (a tuple of tuples; for one output its shape) from the inputs' shapes.
        types: the outputs' types, likewise; None where both functions are one.
        bprop: function (*inputs, outputs, gradients of the outputs) -> gradients of the inputs.
        attributes: numbers that the kernel reads.
    """
    from mindspore import ops

    _fit_threads()
    operator = ops.Custom(f"{library_path()}:{name}", shapes, types or shapes, "aot", bprop)
    for key, value in attributes.items():
        operator.add_prim_attr(key, repr(float(value)))
    return operator
