"""A header is read as the safetensors package reads it, or refused with the file's name: never a traceback."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.json_variants import variants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.json_files import read_object
from mindformers_ext.files.safetensors_format import DTYPES, Output, read_folder, read_header, read_index, write_folder

HEADER = {
    "__metadata__": {"format": "pt"},
    "b": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]},
    "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [24, 24]},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DATA = np.random.default_rng(0).integers(0, 256, 40).astype(np.uint8).tobytes()


def write(path: Path, header: object, data: bytes = DATA) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def check(path: Path) -> bool:
    """True when the file is read, as the package reads it; False when it is refused by name."""
    try:
        tensors, metadata = read_header(path)
    except ConfigError as error:
        assert str(path) in str(error)
        return False
    with safe_open(path, "np") as theirs:
        assert set(tensors) == set(theirs.keys()) and metadata == (theirs.metadata() or {})
        for name, tensor in tensors.items():
            part = theirs.get_slice(name)
            assert (DTYPES[part.get_dtype()], list(tensor.shape)) == (tensor.dtype, part.get_shape())
            if part.get_dtype() != "BF16":  # which numpy lacks
                assert tensor[...].tobytes() == theirs.get_tensor(name).tobytes()
    return True


def test_a_good_header_is_read_with_its_values(tmp_path):
    path = write(tmp_path / "x.safetensors", HEADER)
    assert check(path)
    tensors, _ = read_header(path)
    assert np.array_equal(tensors["b"][...], np.frombuffer(DATA[:24], ml_dtypes.bfloat16).reshape(4, 3), equal_nan=True)
    assert tensors["empty"][...].shape == (0, 5)


def entries(dtype: str, **places: tuple[int, int]) -> dict:
    """A header of vectors of bytes (or of another type) that lie at these places."""
    return {
        name: {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in places.items()
    }


BAD = {
    "negative": ({"a": {"dtype": "F32", "shape": [-5, -2], "data_offsets": [0, 40]}}, DATA),
    "float": ({"a": {"dtype": "F32", "shape": [10.0], "data_offsets": [0, 40]}}, DATA),
    "overlap": (
        {k: {"dtype": "U8", "shape": [30], "data_offsets": [i, i + 30]} for k, i in (("a", 0), ("b", 10))},
        DATA,
    ),
    "same_bytes": ({k: {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]} for k in "ab"}, DATA),
    "gap": ({k: {"dtype": "U8", "shape": [10], "data_offsets": [i, i + 10]} for k, i in (("a", 0), ("b", 30))}, DATA),
    "trailing": (HEADER, DATA + b"1"),
    "short": (HEADER, DATA[:-1]),
    "metadata": ({**HEADER, "__metadata__": []}, DATA),
    "metadata_numbers": ({**HEADER, "__metadata__": {"a": 1}}, DATA),
    "list": ([], b""),
    "deep": (b'{"a":' * 100_000, b""),
    "text": (b'{"a', b""),
    "bytes": (b'{"a\xff":{}}', b""),
    "unknown_type": ({"a": {"dtype": "U16", "shape": [20], "data_offsets": [0, 40]}}, DATA),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers_are_refused_by_name(tmp_path, name):
    assert not check(write(tmp_path / "x.safetensors", *BAD[name]))


def test_every_value_of_a_header_replaced(tmp_path):
    found = [check(write(tmp_path / "x.safetensors", header)) for header in variants(HEADER)]
    assert len(found) > 300 and sum(found) < 30  # the rest is still a header


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_flipped_bit_or_cut_end(tmp_path, where: float, bit: int, cut: bool):
    path = write(tmp_path / "x.safetensors", HEADER)
    content = bytearray(path.read_bytes())
    place = int(where * len(content))
    content[place] ^= 1 << bit
    path.write_bytes(content[:place] if cut else content)
    assert not (check(path) and cut)


def test_what_is_no_file_is_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        assert not check(path)


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"\xff\xfe", b"{", b'{"a":' * 100_000, b'{"weight_map": NaN}', b'{"weight_map": []}', b"{}"]
    + [b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../b"}}', b'{"weight_map": {"a": null}}'],
)
def test_bad_indices_are_refused_by_name(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_index(path)


def test_what_is_written_is_read_again(tmp_path):
    values = {"w": np.ones((3, 4), ml_dtypes.bfloat16), "e": np.empty((0, 4), np.float32)}
    outputs = [Output(name, value.shape, value.dtype, [lambda value=value: value]) for name, value in values.items()]
    write_folder(tmp_path, outputs, "model", "source", {"format": "np"}, 1)
    assert all(check(path) for path in tmp_path.glob("*.safetensors"))
    tensors = read_folder(tmp_path, "model.safetensors.index.json")
    assert all(np.array_equal(tensors[name][...], value) for name, value in values.items())


def test_a_folder_in_place_of_a_json_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_object(tmp_path)
