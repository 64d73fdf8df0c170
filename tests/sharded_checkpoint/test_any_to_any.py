"""A checkpoint of any layout loads into any other, against slices of the whole values."""

from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from helpers.layouts import LAYOUTS, Degrees, compiled, cut, save, shapes, slots, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.layout import StoredPiece, compiled_slots, covers
from mindformers_ext.sharded_checkpoint.reader import check_names, load, open_source
from mindformers_ext.sharded_checkpoint.shards import Slot

VALUES = values()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every layout."""
    root = tmp_path_factory.mktemp("layouts")
    for degrees in LAYOUTS:
        save(root / degrees.name, degrees)
    return {degrees.name: root / degrees.name for degrees in LAYOUTS}


@pytest.mark.parametrize("target", LAYOUTS, ids=lambda degrees: degrees.name)
@pytest.mark.parametrize("origin", LAYOUTS, ids=lambda degrees: degrees.name)
def test_every_pair(saved, origin: Degrees, target: Degrees) -> None:
    source = open_source(saved[origin.name])
    held = slots(target)
    check_names(source, {name: slot for own in held for name, slot in own.items()})
    for own in held:
        check_names(source, own, whole_model=False)
        for name, array in load(source, own):
            np.testing.assert_array_equal(array, cut(VALUES[name], own[name]), err_msg=name)


@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda degrees: degrees.name)
def test_every_element_is_written_once(saved, degrees: Degrees) -> None:
    """Copies are not stored; safetensors itself reads the files; a counter is no state."""
    files = sorted((saved[degrees.name] / "step_000007").glob("rank_*.safetensors"))
    assert len(files) == degrees.ranks
    sizes: dict[str, int] = {}
    for file in files:
        for name, array in load_file(file).items():
            sizes[name] = sizes.get(name, 0) + array.size
    assert sizes.pop("global_step") == len(degrees.first_layers)  # every pipeline stage has one
    assert sizes == {name: value.size for name, value in VALUES.items() if name != "global_step"}


def test_optimizer_shards_and_copies_of_a_rank() -> None:
    """dp2 mp2 with optimizer groups of two: worked out by hand for rank 3."""
    own = compiled_slots(compiled(Degrees(dp=2, mp=2, ep=1, shard=2), 3))
    assert own["layers.0.q_proj.weight"] == Slot((16, 8), ((12, 16), (0, 8)), 0)  # mp's second half, its second half
    assert own["adam_m.layers.1.o_proj.weight"] == Slot((8, 16), ((4, 8), (8, 16)), 0)
    assert own["norm.weight"] == Slot((8,), ((4, 8),), 1)  # four copies in groups of two: the second group
    assert own["global_step"] == Slot((1,), ((0, 1),), 3)
    assert "layers.0.gate.expert_load" not in own


def test_private_state_of_a_rank_that_did_not_save(saved) -> None:
    source = open_source(saved["dp2-mp2"])
    assert [source.private(rank)["rank"] for rank in (0, 3, 5)] == [0, 3, 1]


def cut_points(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, size - 1), max_size=3, unique=True).map(lambda cuts: [0, *sorted(cuts), size])


@settings(max_examples=60, deadline=None)
@given(rows=cut_points(9), columns=cut_points(7), drop=st.integers(0, 30))
def test_coverage_is_exact(rows: list[int], columns: list[int], drop: int) -> None:
    """A grid of pieces covers; without one of them it does not, unless a copy of it is there."""
    grid = list(product(pairwise(rows), pairwise(columns)))
    pieces = [StoredPiece(0, ranges, ()) for ranges in grid]
    assert covers(pieces, (9, 7))
    drop %= len(pieces)
    assert not covers(pieces[:drop] + pieces[drop + 1 :], (9, 7))
    assert covers([*pieces, pieces[drop]], (9, 7))


def test_names_that_do_not_fit(saved) -> None:
    source = open_source(saved["mp4"])
    whole = {name: Slot.whole(shape) for name, shape in shapes().items()}
    check_names(source, whole)
    with pytest.raises(ConfigError, match="lacks 1 parameters of this model: layers.4.q_proj.weight"):
        check_names(source, whole | {"layers.4.q_proj.weight": Slot.whole((16, 8))})
    with pytest.raises(ConfigError, match=r"'embed_tokens.weight' is \(16, 8\) there and \(32, 8\) here"):
        check_names(source, whole | {"embed_tokens.weight": Slot.whole((32, 8))})
    fewer = {name: slot for name, slot in whole.items() if not name.startswith("layers.3.")}
    with pytest.raises(ConfigError, match="holds 3 weights that this model lacks: layers.3.experts"):
        check_names(source, fewer)
    check_names(source, fewer, may_leave=lambda name: name.startswith("layers.3."))
