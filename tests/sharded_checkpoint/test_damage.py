"""Damaged and foreign checkpoints are refused with the names, and nothing of them is loaded."""

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from helpers.json_variants import variants
from helpers.layouts import Degrees, save, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Parameter, Tensor, nn

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.audit import verify_all
from mindformers_ext.sharded_checkpoint.layout import BLOCK_BYTES, Meta, Piece, write_signed_json
from mindformers_ext.sharded_checkpoint.network import load_into, pieces_of
from mindformers_ext.sharded_checkpoint.reader import load, open_source
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.sharded_checkpoint.writer import Saver
from mindformers_ext.training.checkpoint_monitor import load_weights

STEP = "step_000007"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint of four ranks."""
    root = tmp_path_factory.mktemp("whole")
    save(root, Degrees(dp=2, mp=2, shard=2))
    return root


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def refuse(root: Path, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        verify_all(open_source(root))


def test_a_missing_rank(copy) -> None:
    (copy / STEP / "rank_0002.safetensors").unlink()
    refuse(copy, "not whole: rank_0002.safetensors is missing; copy it again")


def test_a_truncated_file(copy) -> None:
    path = copy / STEP / "rank_0001.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    refuse(copy, f"not whole: rank_0001.safetensors has {size - 100} bytes in place of {size}")


@pytest.mark.parametrize("name", ["layout.json", "meta.json"])
def test_a_missing_description(copy, name: str) -> None:
    (copy / STEP / name).unlink()
    refuse(copy, f"{name} is missing; the checkpoint is not whole")


def test_a_latest_that_points_nowhere(copy) -> None:
    (copy / "latest").write_text("step_000099")
    refuse(copy, "has no checkpoint 'step_000099', only step_000007")


def test_another_format(copy) -> None:
    path = copy / STEP / "meta.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    write_signed_json(path, content | {"format": 2})
    refuse(copy, "has format 2, but this program reads 1")


def test_a_flipped_byte_is_named(copy) -> None:
    path = copy / STEP / "rank_0003.safetensors"
    source = open_source(copy)
    name = next(n for n, entry in source.layout.entries.items() if any(p.rank == 3 for p in entry.pieces))
    with open(path, "r+b") as stream:
        stream.seek(source.part(3)[name].offset)
        stream.write(b"\xff\xff")
    refuse(copy, f"damaged: '{name}' in rank_0003.safetensors")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), file=st.integers(0, 5))
def test_any_flipped_bit_is_found(copy, where: float, bit: int, file: int) -> None:
    """In any file of the step: refused, or (white space in JSON) the same values are read."""
    path = sorted((copy / STEP).iterdir())[file]
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        source = open_source(copy)
        verify_all(source)
    except ConfigError as error:
        assert str(copy) in str(error)
    else:
        assert path.suffix == ".json"
        for name, value in values().items():
            np.testing.assert_array_equal(source.read(name)[...], value)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("content", [b"[]", b"-1", b"null", b"\xff\xfe", b"{", b'{"a":' * 100_000, b"{}", b"NaN", b""])
@pytest.mark.parametrize("name", ["layout.json", "meta.json"])
def test_a_description_that_is_something_else(copy, name: str, content: bytes) -> None:
    (copy / STEP / name).write_bytes(content)
    refuse(copy, f"{name}: .*use another checkpoint")


def test_a_description_that_is_a_folder(copy) -> None:
    (copy / STEP / "meta.json").unlink()
    (copy / STEP / "meta.json").mkdir()
    refuse(copy, "meta.json: cannot be read: Is a directory")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"../x", b"step_000007\0", b"a" * 5000])
def test_a_latest_that_is_no_name(copy, content: bytes) -> None:
    (copy / "latest").write_bytes(content)
    refuse(copy, "latest: cannot be read|has no checkpoint")


def test_a_latest_that_is_a_folder(copy) -> None:
    (copy / "latest").unlink()
    (copy / "latest").mkdir()
    refuse(copy, "latest: cannot be read: Is a directory; write the name of a step into it")
    (copy / "latest").rmdir()
    (copy / "step_²").mkdir()  # a digit for Python, but not for int()
    verify_all(open_source(copy))


@pytest.mark.parametrize("name", ["layout.json", "meta.json"])
def test_every_value_of_a_description_replaced(copy, name: str) -> None:
    """With a true checksum, as another program might write it: refused by name, or the same values are read."""
    path = copy / STEP / name
    content = json.loads(path.read_text())
    del content["checksum"]
    if name == "layout.json":  # one parameter is as good as all
        kept = dict(list(content["entries"].items())[:2])
        content["entries"] = kept
    wrong = list(variants(content))
    rng = np.random.default_rng(0)
    for changed in [wrong[i] for i in rng.choice(len(wrong), min(len(wrong), 150), replace=False)]:
        write_signed_json(path, changed) if isinstance(changed, dict) else path.write_text(json.dumps(changed))
        try:
            source = open_source(copy)
            verify_all(source)
            for parameter in source.names():
                assert np.array_equal(source.read(parameter)[...], values()[parameter])
        except ConfigError as error:
            assert str(copy) in str(error)


def test_only_what_is_read_is_checked(tmp_path) -> None:
    """A rank compares the blocks of its own rows: damage elsewhere is another rank's to find."""
    value = np.arange(3 * BLOCK_BYTES // 4, dtype=np.float32).reshape(-1, 4)
    Saver(tmp_path).save(Meta(1, 1), {"w": Piece(value, Slot.whole(value.shape))})
    path = tmp_path / "step_000001/rank_0000.safetensors"
    with open(path, "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    half = len(value) // 2
    source = open_source(tmp_path)
    (_, first), *_ = load(source, {"w": Slot(value.shape, ((0, half), (1, 3)))})
    np.testing.assert_array_equal(first, value[:half, 1:3])
    with pytest.raises(ConfigError, match="damaged: 'w' in rank_0000.safetensors"):
        list(load(source, {"w": Slot(value.shape, ((half, 2 * half), (0, 4)))}))


class Model(nn.Cell):
    """Two layers, a router's bias and counter, and an MTP weight."""

    def __init__(self, vocab_size: int = 8, num_layers: int = 2, mtp: bool = True):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": vocab_size, "num_layers": num_layers})()
        shapes = {"model.embed.weight": (vocab_size, 4), "model.router.bias": (3,), "model.router.expert_load": (3,)}
        shapes |= {f"model.layers.{i}.weight": (4, 4) for i in range(num_layers)}
        shapes |= {"mtp.0.weight": (4,)} if mtp else {}
        rng = np.random.default_rng(num_layers)
        self.all = ms.ParameterTuple(
            [Parameter(Tensor(rng.standard_normal(shape), ms.float32), name=name) for name, shape in shapes.items()]
        )


def snapshot(network: nn.Cell) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy().copy() for parameter in network.get_parameters()}


def store(root: Path, network: Model) -> None:
    sizes = {"vocab_size": network.config.vocab_size, "num_layers": network.config.num_layers}
    Saver(root).save(Meta(1, 1, model=sizes), pieces_of(network))


FOREIGN = [
    (Model(vocab_size=16), "vocab_size 8, not 16", r"'model.embed.weight' is \(8, 4\) there and \(16, 4\) here"),
    (Model(num_layers=3), "num_layers 2, not 3", "lacks 1 parameters of this model: model.layers.2.weight"),
    (Model(num_layers=1), "num_layers 2, not 1", "holds 1 weights that this model lacks: model.layers.1.weight"),
]


@pytest.mark.parametrize("network,size,names", FOREIGN, ids=[size for _, size, _ in FOREIGN])
def test_a_checkpoint_of_another_model_loads_nothing(tmp_path, network: Model, size: str, names: str) -> None:
    """Told by the sizes; and by names and shapes where a checkpoint does not tell sizes."""
    store(tmp_path, Model())
    before = snapshot(network)
    with pytest.raises(ConfigError, match=f"is of a model with {size}; give a checkpoint of this model"):
        load_weights(network, open_source(tmp_path))
    parameters = {p.name: p for p in network.get_parameters() if "expert_load" not in p.name}
    with pytest.raises(ConfigError, match=names):
        load_into(network, parameters, open_source(tmp_path))
    for name, value in snapshot(network).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_damaged_checkpoint_loads_nothing(tmp_path) -> None:
    """The last parameter of the file is damaged: the first ones are not loaded either."""
    store(tmp_path, Model())
    path = tmp_path / "step_000001/rank_0000.safetensors"
    with open(path, "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    network = Model()
    for parameter in network.get_parameters():
        parameter.set_data(parameter * 0)
    with pytest.raises(ConfigError, match="damaged: 'mtp.0.weight' in rank_0000.safetensors"):
        load_weights(network, open_source(tmp_path))
    assert all(not value.any() for value in snapshot(network).values())


def test_weights_load_without_counters_and_without_mtp(tmp_path) -> None:
    trained = Model()
    store(tmp_path, trained)
    source = open_source(tmp_path)
    assert "model.router.expert_load" not in source.names()
    network = Model(mtp=False)
    network.all[2].set_data(Tensor(np.full(3, 9.0), ms.float32))
    load_weights(network, source)
    loaded = snapshot(network)
    np.testing.assert_array_equal(loaded.pop("model.router.expert_load"), [9, 9, 9])
    for name, value in loaded.items():
        np.testing.assert_array_equal(value, snapshot(trained)[name])


def test_bfloat16_weights_come_back_and_are_converted(tmp_path) -> None:
    rng = np.random.default_rng(1)
    cell = nn.Cell()
    cell.w = Parameter(Tensor(rng.standard_normal((3, 5)), ms.bfloat16), name="w")
    Saver(tmp_path).save(Meta(1, 1), pieces_of(cell))
    source = open_source(tmp_path)
    for dtype in (ms.bfloat16, ms.float32):
        other = nn.Cell()
        other.w = Parameter(Tensor(np.zeros((3, 5)), dtype), name="w")
        load_into(other, {"w": other.w}, source)
        assert other.w.dtype == dtype
        np.testing.assert_array_equal(other.w.astype(ms.float32).asnumpy(), cell.w.astype(ms.float32).asnumpy())
