"""The lowest and highest id of a file: right, remembered, and read again when the file changes."""

import os

import numpy as np
import pytest

from mindformers_ext.bin_dataset import token_range as module
from mindformers_ext.bin_dataset.indexed_dataset import CODES, IndexedDataset, IndexedDatasetWriter, bin_path
from mindformers_ext.bin_dataset.token_range import token_range


def write(prefix, tokens, dtype):
    with IndexedDatasetWriter(prefix, dtype) as writer:
        if len(tokens):
            writer.add_document(np.asarray(tokens, dtype))
    return IndexedDataset(prefix)


@pytest.mark.parametrize("dtype", [dtype for dtype in CODES if dtype.kind in "iu"], ids=str)
@pytest.mark.parametrize("place", [0, 1234, 4999])
def test_every_token_is_looked_at(dtype, place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    monkeypatch.setattr(module, "STRETCH", 1700)
    limits = np.iinfo(dtype)
    for value in (limits.min, limits.max):
        tokens = np.full(5000, 3)
        tokens[place] = value
        dataset = write(tmp_path / f"{value}", tokens, dtype)
        assert token_range(dataset) == (min(0, value), max(3, value))


def test_no_tokens(tmp_path):
    assert token_range(write(tmp_path / "none", [], np.int32)) == (0, 0)


def test_read_once_until_the_file_changes(tmp_path, monkeypatch):
    reads = []
    find = module._find
    monkeypatch.setattr(module, "_find", lambda dataset: reads.append(1) or find(dataset))
    dataset = write(tmp_path / "p", [1, 2, 3], np.int32)
    for _ in range(2):
        assert token_range(dataset) == (0, 3)
    assert token_range(dataset, str(tmp_path / "elsewhere")) == (0, 3)
    assert len(reads) == 2
    path, stat = bin_path(tmp_path / "p"), os.stat(bin_path(tmp_path / "p"))
    path.write_bytes(np.array([1, -2, 3], np.int32).tobytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time
    assert token_range(IndexedDataset(tmp_path / "p")) == (-2, 3)
