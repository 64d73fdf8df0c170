"""Find NaN and infinity at the speed of memory, in every type of weights."""

import ml_dtypes
import numpy as np

from mindformers_ext.files import _finite

# A value is not finite when all of these bits are set: the exponent's, in FP8 (E4M3) the mantissa's too.
BITS = {
    np.dtype(np.float64): (np.uint64, 0x7FF0 << 48),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F),
}


def all_finite(values: np.ndarray) -> bool:
    """True when no value of a floating-point array is NaN or infinite."""
    unsigned, bits = BITS[values.dtype]
    return not _finite.any_has_all(np.ascontiguousarray(values).view(unsigned), bits)
