"""What makes conversion fast gives the same bytes as numpy and an ordinary file."""

import os

import numpy as np
import pytest

from mindformers_ext.files import _transpose
from mindformers_ext.files import direct as direct_file
from mindformers_ext.files.direct import DirectFile

# Rows and columns around the sizes of a square in registers (8 or 4) and of a tile (64).
SHAPES = [(1, 1), (7, 9), (8, 8), (4, 12), (64, 64), (128, 192), (65, 130), (130, 3), (71, 200), (0, 4), (4, 0)]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_matrices_equal_numpys(shape, dtype):
    """Into the middle of a wider matrix, as an expert's up_proj goes beside gate_proj; nothing else is touched."""
    rows, columns = shape
    value = np.random.default_rng(0).integers(1, 2**16, (rows, columns + 5)).astype(dtype)[:, 2 : columns + 2]
    wide = np.zeros((columns, 2 * rows + 1), dtype)
    _transpose.transpose_into(wide[:, rows : 2 * rows], value)
    expected = np.zeros_like(wide)
    expected[:, rows : 2 * rows] = value.T
    assert np.array_equal(wide, expected)


def test_a_tensor_that_begins_at_an_odd_byte_is_transposed():
    raw = np.random.default_rng(0).integers(0, 256, 2 * 70 * 90 + 1).astype(np.uint8)
    value = raw[1:].view(np.uint16).reshape(70, 90)
    place = np.zeros((90, 70), np.uint16)
    _transpose.transpose_into(place, value)
    assert np.array_equal(place, value.T)


def test_matrices_that_do_not_fit_are_refused():
    square = np.zeros((4, 4), np.uint16)
    read_only = square.copy()
    read_only.flags.writeable = False
    for place, value in (
        (square, np.zeros((4, 5), np.uint16)),
        (square, np.zeros((4, 4), np.uint32)),
        (square, np.zeros((4, 8), np.uint16)[:, ::2]),
        (np.zeros((4, 4)), np.zeros((4, 4))),
        (read_only, square),
    ):
        with pytest.raises(ValueError, match="transpose_into needs"):
            _transpose.transpose_into(place, value)


@pytest.mark.parametrize("folder", ["disk", "/dev/shm"])  # the second has no direct writing
def test_appended_arrays_are_the_file(tmp_path, monkeypatch, folder):
    """Sizes below, at and above those of a block and of a buffer; the last one is not whole."""
    monkeypatch.setattr(direct_file, "BUFFER_BYTES", 2 * direct_file.BLOCK)
    path = (tmp_path if folder == "disk" else direct_file.Path(folder)) / f"direct_{os.getpid()}"
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, size).astype(np.uint8) for size in (13, 4083, 0, 4096, 8192, 30001, 1)]
    arrays.append(generator.standard_normal((7, 11)).astype(np.float32).T)
    try:
        with DirectFile(path) as file:
            for array in arrays:
                file.append(array)
            assert file.size == sum(array.nbytes for array in arrays)
        assert path.read_bytes() == b"".join(array.tobytes() for array in arrays)
    finally:
        path.unlink()


def test_a_full_disk_is_reported():
    with pytest.raises(OSError, match="No space left"), DirectFile("/dev/full") as file:
        file.append(np.ones(10, np.uint8))
