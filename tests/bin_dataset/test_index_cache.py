"""The index cache: shared by concurrent ranks, never stale, never half."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.bin_dataset import index_cache
from mindformers_ext.bin_dataset.gpt_dataset import GPTDataset, GPTDatasetConfig
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset

LENGTHS = [30, 40, 50, 60] * 20


def build(prefix, cache, **config):
    return GPTDataset(IndexedDataset(prefix), GPTDatasetConfig(sequence_length=16, path_to_cache=str(cache), **config))


def entries(cache):
    return sorted(path for path in Path(cache).iterdir() if path.is_dir())


def test_second_build_reads_the_first(corpus, tmp_path):
    prefix = corpus("c", LENGTHS)
    first = build(prefix, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    before = (entry / "shuffle_index.npy").stat().st_mtime_ns
    second = build(prefix, tmp_path / "cache")
    np.testing.assert_array_equal(first.sample_index, second.sample_index)
    assert (entry / "shuffle_index.npy").stat().st_mtime_ns == before


def test_changed_data_or_config_is_another_entry(corpus, tmp_path):
    prefix = corpus("c", LENGTHS)
    build(prefix, tmp_path / "cache")
    build(prefix, tmp_path / "cache", random_seed=5)
    corpus("c", LENGTHS[::-1])  # Same name and size, other documents.
    stale = build(prefix, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 3
    np.testing.assert_array_equal(stale.sample_index, build(prefix, tmp_path / "fresh").sample_index)


@pytest.mark.parametrize("name", ["sample_index.npy", "description.json", "arrays.json"])
def test_damaged_entry_is_built_again(name, corpus, tmp_path):
    prefix = corpus("c", LENGTHS)
    expected = np.array(build(prefix, tmp_path / "cache").sample_index)
    (entry,) = entries(tmp_path / "cache")
    (entry / name).write_bytes((entry / name).read_bytes()[:-5])
    np.testing.assert_array_equal(build(prefix, tmp_path / "cache").sample_index, expected)


def test_concurrent_ranks_build_once(corpus, tmp_path):
    prefix = corpus("c", [70] * 20_000)
    code = (
        "import sys, zlib; from mindformers_ext.bin_dataset.gpt_dataset import *\n"
        "d = GPTDataset(IndexedDataset(sys.argv[1]), GPTDatasetConfig(sequence_length=16, path_to_cache=sys.argv[2]))\n"
        "print(zlib.crc32(d.shuffle_index), zlib.crc32(d.document_index))"
    )
    command = [sys.executable, "-c", code, prefix, str(tmp_path / "cache")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = {rank.communicate()[0] for rank in ranks}
    assert all(rank.returncode == 0 for rank in ranks) and len(outputs) == 1
    assert len(entries(tmp_path / "cache")) == 1


def test_unwritable_folder_is_a_warning(corpus, tmp_path):
    prefix = corpus("c", LENGTHS)
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep indices"):
        dataset = build(prefix, tmp_path / "file" / "cache")
    np.testing.assert_array_equal(dataset.sample_index, build(prefix, tmp_path / "cache").sample_index)
    shutil.rmtree(tmp_path / "cache")


ARRAYS = {"first": np.arange(9, dtype=np.int32), "second": np.arange(6, dtype=np.int64).reshape(3, 2)}


def load(folder, build=lambda: ARRAYS):
    return index_cache.load_or_build(folder, {"kind": "test"}, build)


def test_every_byte_and_every_length_of_an_entry(tmp_path):
    """Whatever is changed, the arrays are right and the entry is whole again."""
    load(tmp_path)
    (entry,) = entries(tmp_path)
    changes = [
        (path, data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        for path in sorted(entry.iterdir())
        for data in [path.read_bytes()]
        for at in range(len(data))
    ]
    changes += [(path, path.read_bytes()[:size]) for path in entry.iterdir() for size in (0, 1, 9, 127, 128, 130)]
    changes += [(path, path.read_bytes() + b"\0") for path in entry.iterdir()]
    changes += [(entry / "arrays.json", text) for text in (b"[]", b"3", b"null", b"[" * 100_000, b"\xff", b'{"x": 3}')]
    whole = {path: path.read_bytes() for path in entry.iterdir()}
    for path, data in changes:
        path.write_bytes(data)
        for got, expected in zip(load(tmp_path), ARRAYS.values(), strict=True):
            np.testing.assert_array_equal(got, expected)
        assert {path: path.read_bytes() for path in entry.iterdir()} == whole, path


def test_entry_without_a_file_is_built_again(tmp_path):
    load(tmp_path)
    (entry,) = entries(tmp_path)
    for path in entry.iterdir():
        path.unlink()
        path.mkdir()
        load(tmp_path)
        assert path.is_file()


def test_what_a_killed_process_left_is_removed(tmp_path):
    def die():
        (tmp_path / f".{entry.name}-abcd1234").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    load(tmp_path)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    other = tmp_path / ".ffff-abcd1234"  # of an entry that another process may be building
    other.mkdir()
    child = multiprocessing.get_context("fork").Process(target=load, args=(tmp_path, die))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and len(entries(tmp_path)) == 2
    load(tmp_path)
    assert entries(tmp_path) == sorted([entry, other])


def test_empty_arrays_are_kept(tmp_path):
    for _ in range(2):
        (got,) = index_cache.load_or_build(tmp_path, {}, lambda: {"none": np.empty((0, 2), np.int32)})
        assert got.shape == (0, 2)


def test_more_samples_than_memory_are_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="samples do not fit into memory .* ask for fewer samples"):
        load(tmp_path, lambda: {"shuffle_index": np.empty(10**17, np.int64)})
    assert entries(tmp_path) == []
