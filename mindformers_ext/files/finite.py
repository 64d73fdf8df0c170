"""Find NaN and infinity at the speed of memory, in every type of weights.

numpy's isfinite makes an array of booleans, and for bfloat16 goes through float32 value by value.
"""

import ml_dtypes
import numpy as np

# A value is not finite when all of these bits are set: the exponent's, in FP8 (E4M3) the mantissa's too.
BITS = {
    np.dtype(np.float64): (np.uint64, 0x7FF0 << 48),
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, 0x7F),
}
CHUNK = 2**18  # values at a time, which stay in a cache


def all_finite(values: np.ndarray) -> bool:
    """True when no value of a floating-point array is NaN or infinite."""
    unsigned, bits = BITS[values.dtype]
    flat, bits = np.ascontiguousarray(values).reshape(-1).view(unsigned), unsigned(bits)
    return all(
        (flat[start : start + CHUNK] & bits).max(initial=unsigned(0)) != bits for start in range(0, flat.size, CHUNK)
    )
