"""The .bin/.idx format against megatron-core's reader and writer, and every kind of damaged file."""

import fcntl
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindformers_ext.bin_dataset.indexed_dataset import (
    CODES,
    CorruptDatasetError,
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
)

DTYPES = sorted(CODES, key=str)


def megatron_write(prefix, dtype, documents):
    """The pair as megatron-core's IndexedDatasetBuilder writes it; a document is a list of sequences."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document([token for sequence in document for token in sequence], [len(s) for s in document])
    builder.finalize(f"{prefix}.idx")


def bytes_of(prefix):
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_megatron_and_each_reads_the_other(dtype, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

    documents = [[[1, 2, 3]], [[4], [5, 6]], [], [[7] * 50], [[9]]]
    megatron_write(tmp_path / "theirs", dtype, documents)
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        for document in documents:
            writer.add_document([token for sequence in document for token in sequence], [len(s) for s in document])
    assert bytes_of(tmp_path / "ours") == bytes_of(tmp_path / "theirs")

    theirs, ours = MegatronDataset(str(tmp_path / "ours")), IndexedDataset(tmp_path / "theirs")
    ours.check()
    assert len(theirs) == len(ours) == 5
    assert ours.num_documents == 5
    for i in range(5):
        np.testing.assert_array_equal(theirs[i], ours[i])
        assert ours[i].dtype == dtype
    np.testing.assert_array_equal(theirs.get(3, offset=5, length=7), ours.get(3, offset=5, length=7))
    for expected, got in zip(theirs[1:4], ours[1:4], strict=True):
        np.testing.assert_array_equal(expected, got)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), max_size=3), max_size=12),
    cut=st.integers(0, 12),
)
def test_merged_parts_equal_one_file(documents, cut, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    dtype = np.dtype(np.uint16)
    megatron_write(folder / "whole", dtype, documents)
    for name, part in (("a", documents[:cut]), ("b", documents[cut:])):
        megatron_write(folder / name, dtype, part)
    with IndexedDatasetWriter(folder / "merged", dtype) as writer:
        writer.add_indices([folder / "a", folder / "b"])
    assert bytes_of(folder / "merged") == bytes_of(folder / "whole")


def test_multimodal_modes_are_read(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), multimodal=True)
    for mode in (0, 3):
        builder.add_item(torch.arange(4), mode)
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    assert IndexedDataset(tmp_path / "m").sequence_modes.tolist() == [0, 3]


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def put(offset, pattern, value):
    return lambda data: struct.pack_into(pattern, data, offset, value)


LENGTHS = 34  # Offset of the first sequence length in a .idx file.
DAMAGE = {
    "truncated .idx header": ("idx", lambda data: data.__delitem__(slice(20, None)), "truncated"),
    "truncated .idx": ("idx", lambda data: data.__delitem__(slice(-3, None)), "truncated or damaged"),
    "truncated .bin": ("bin", lambda data: data.__delitem__(slice(-1, None)), "truncated"),
    "empty .bin": ("bin", lambda data: data.clear(), "truncated"),
    "wrong magic": ("idx", put(0, "<B", 0), "not a Megatron index"),
    "wrong version": ("idx", put(9, "<Q", 2), "format version 2"),
    "unknown dtype": ("idx", put(17, "<B", 77), "dtype code 77"),
    "another dtype": ("idx", put(17, "<B", 8), "another dtype"),
    "lengths that do not sum": ("idx", put(LENGTHS, "<i", 4), "lengths in"),
    "negative length": ("idx", put(LENGTHS, "<i", -1), "length -1"),
    "count far too large": ("idx", put(18, "<Q", 2**61), "truncated or damaged"),
    "document mark": ("idx", put(LENGTHS + 5 * 12, "<q", 1), "document marks"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, corpus):
    prefix = corpus("c", [3, 4, 5, 6, 7])
    suffix, change, message = DAMAGE[kind]
    rewrite(Path(f"{prefix}.{suffix}"), change)
    with pytest.raises(CorruptDatasetError, match=message) as error:
        IndexedDataset(prefix)
    assert prefix in str(error.value)


def test_damage_inside_is_found_by_check(corpus):
    prefix = corpus("c", [3, 4, 5])
    rewrite(idx_path(prefix), put(LENGTHS + 12 + 8, "<q", 1))
    dataset = IndexedDataset(prefix)
    with pytest.raises(CorruptDatasetError, match="sequence 1 starts at byte 1, .* end at byte 12"):
        dataset.check()


def test_wild_offsets_never_read_outside_the_file(corpus, tmp_path):
    from mindformers_ext.bin_dataset.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefix = corpus("c", [30, 40, 50])
    rewrite(idx_path(prefix), put(LENGTHS + 12, "<q", 2**40))
    config = GPTDatasetConfig(sequence_length=8, path_to_cache=str(tmp_path / "cache"))
    dataset = GPTDataset(IndexedDataset(prefix), config)
    with pytest.raises(IndexError, match="outside the token file"):
        dataset.batch(np.arange(len(dataset)))


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_half(suffix, corpus):
    prefix = corpus("c", [3])
    Path(f"{prefix}.{suffix}").unlink()
    with pytest.raises(FileNotFoundError, match=f"c.{suffix} does not exist although"):
        IndexedDataset(prefix)


def test_token_outside_vocabulary(corpus):
    prefix = corpus("c", [30, 40, 50])
    dataset = IndexedDataset(prefix)
    dataset.check(1000)
    limit = int(dataset.tokens.max())
    with pytest.raises(CorruptDatasetError, match=f"is {limit}, outside the vocabulary of {limit} ids"):
        dataset.check(limit)


def test_token_that_does_not_fit_dtype(tmp_path):
    with (
        pytest.raises(ValueError, match="70000 do not fit dtype uint16"),
        IndexedDatasetWriter(tmp_path / "p", np.uint16) as w,
    ):
        w.add_document([5, 70_000])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_pair(corpus):
    prefix = corpus("c", [3, 4])
    before = bytes_of(prefix)
    with pytest.raises(RuntimeError, match="stop"), IndexedDatasetWriter(prefix) as writer:
        writer.add_document([1, 2, 3])
        raise RuntimeError("stop")
    assert bytes_of(prefix) == before


def test_two_writers_on_one_prefix_are_refused(tmp_path):
    with IndexedDatasetWriter(tmp_path / "p") as writer:
        with pytest.raises(RuntimeError, match="another process is writing"):
            IndexedDatasetWriter(tmp_path / "p")
        writer.add_document([1])
    assert len(IndexedDataset(tmp_path / "p")) == 1


def test_full_disk_leaves_no_file_under_the_final_name(tmp_path):
    # A file-size limit is the full disk that an unprivileged test can have: write() fails with an OSError.
    code = """
import resource, signal, sys
import numpy as np
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with IndexedDatasetWriter(sys.argv[1]) as writer:
        for _ in range(100):
            writer.add_document(np.zeros(10_000, np.int32))
except OSError as error:
    print("OSError", error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, check=True)
    assert "OSError" in done.stdout
    assert list(tmp_path.iterdir()) == []


def changes_of(data):
    """Every byte changed in five ways, every truncation, and bytes too many."""
    for at in range(len(data)):
        for value in {data[at] ^ 1, data[at] ^ 16, data[at] ^ 128, 0, 255} - {data[at]}:
            yield data[:at] + bytes([value]) + data[at + 1 :]
        yield data[:at]
    for extra in (1, 4, 5, 8, 100):
        yield data + bytes(extra)


@pytest.mark.parametrize("documents", [[], [[]], [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]]], ids=len)
@pytest.mark.parametrize("suffix", ["idx", "bin"])
def test_a_changed_file_gives_the_right_sequences_or_is_refused(documents, suffix, tmp_path):
    """Whatever byte of the index is changed: CorruptDatasetError, or every sequence as it was."""
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        for document in documents:
            writer.add_document(np.array(document, np.uint16))
    path = Path(f"{tmp_path / 'p'}.{suffix}")
    original = path.read_bytes()
    expected = [sequence.tolist() for sequence in IndexedDataset(tmp_path / "p")]
    for number, data in enumerate(changes_of(original)):
        if suffix == "bin" and len(data) == len(original):
            continue  # other tokens: nothing in the format says which are right
        path.unlink()  # a new file, as the old one may still be mapped
        path.write_bytes(data)
        try:
            got = [sequence.tolist() for sequence in IndexedDataset(tmp_path / "p")]
        except CorruptDatasetError as error:
            assert str(path) in str(error) or suffix == "bin" or "p.bin" in str(error), number
        else:
            assert got == expected, number


def test_a_writer_that_opened_before_another_finished_leaves_its_file_alone(tmp_path, monkeypatch):
    """The first writer ends between the second's open and its lock, which is then one on the finished file."""
    prefix = tmp_path / "data"
    first = IndexedDatasetWriter(prefix, np.int32)
    first.add_document([1, 2, 3])
    lock = fcntl.flock

    def finish_then_lock(file, how):
        first.close()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", finish_then_lock)
    with pytest.raises(RuntimeError, match="another process has just finished"):
        IndexedDatasetWriter(prefix, np.int32)
    assert IndexedDataset(prefix)[0].tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_what_was_read_of_an_index_is_given_back(tmp_path):
    """Opening reads all lengths; a corpus of any size then holds no memory, until samples are read."""
    with IndexedDatasetWriter(tmp_path / "P", np.uint16) as writer:
        sequences = 1 << 20
        writer.add_batch(np.zeros(sequences, np.uint16), np.ones(sequences, np.int32), np.ones(sequences, np.int64))
    dataset = IndexedDataset(tmp_path / "P")
    maps = Path("/proc/self/smaps").read_text().split("\n", 1)[1]
    found = re.search(r"/P\.idx\n.*?Rss:\s+(\d+) kB", maps, re.DOTALL)
    assert len(dataset) == sequences
    assert int(found[1]) < 64 * 20  # kB; the lengths alone are 4096
