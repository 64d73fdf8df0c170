"""NaN and infinity are found in every type of weights, and nothing else is."""

import ml_dtypes
import numpy as np
import pytest

from mindformers_ext.files.finite import BITS, all_finite


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_every_bit_pattern_is_judged_as_numpy_does(dtype):
    """All of the 8 and 16 bit types, random ones of the others."""
    size = dtype.itemsize
    if size <= 2:
        values = np.arange(256**size, dtype=BITS[dtype][0]).view(dtype)
    else:
        values = np.random.default_rng(0).integers(0, 256, 8 * 4000, np.uint8).view(dtype)
        values = np.concatenate([values, np.array([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0], dtype)])
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = np.isfinite(values.astype(np.float64))
    assert not expected.all()
    assert [all_finite(value) for value in values[:, None]] == expected.tolist()


CHUNK = 4096  # of finite.cc


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 3 * CHUNK + 4])
def test_one_value_anywhere(place, dtype):
    values = np.ones(3 * CHUNK + 5, dtype)
    assert all_finite(values) and all_finite(values[::2]) and all_finite(values[:0])
    values[place] = np.nan
    assert not all_finite(values) and not all_finite(values.reshape(1, -1).T)


def test_a_tensor_that_begins_at_an_odd_byte():
    raw = np.zeros(2 * 100 + 1, np.uint8)
    values = raw[1:].view(ml_dtypes.bfloat16)
    assert all_finite(values)
    values[77] = np.inf
    assert not all_finite(values)
