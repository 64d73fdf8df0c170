"""The index cache: shared by concurrent ranks, never stale, never half."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
