"""Cutting and gathering parameters by layout, against shards written down by hand and by round trip."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ext.sharded_checkpoint.shards import gather, layout_for, shard_of


def layout(matrix: list[int], tensor_map: list[int]) -> dict:
    return {"device_matrix": matrix, "tensor_map": tensor_map}


def test_tensor_parallel_columns():
    """Device matrix (dp 2, mp 2), columns on mp (axis 0 from the last): ranks 0 and 2 share the left half."""
    full = np.arange(24).reshape(4, 6)
    for index, columns in enumerate([slice(0, 3), slice(3, 6)] * 2):
        shard = shard_of("w", full.shape, (4, 3), layout([2, 2], [-1, 0]), index)
        assert np.array_equal(shard.cut(full), full[:, columns])


def test_optimizer_parallel_cuts_rows_once_more():
    """The ranks that share a slice split its rows in rank order: for mp slice 1 these are ranks 1 and 3."""
    full = np.arange(24).reshape(4, 6)
    rows = {0: slice(0, 2), 1: slice(0, 2), 2: slice(2, 4), 3: slice(2, 4)}
    for index in range(4):
        shard = shard_of("w", full.shape, (2, 3), layout([2, 2], [-1, 0]), index)
        assert np.array_equal(shard.cut(full), full[rows[index], slice(index % 2 * 3, index % 2 * 3 + 3)])


def test_optimizer_parallel_in_groups_of_two():
    """Four copies, two ranks share one: consecutive ranks form the groups."""
    full = np.arange(8)
    parts = [shard_of("w", (8,), (4,), layout([4], [-1]), index).cut(full).tolist() for index in range(4)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3), st.data())
def test_gather_undoes_cut(matrix, data):
    axes = data.draw(st.permutations([*range(len(matrix)), -1, -1]))[:2]
    full = np.random.default_rng(0).standard_normal((36, 18))
    parts = [1 if axis < 0 else matrix[len(matrix) - 1 - axis] for axis in axes]
    stored = (36 // parts[0], 18 // parts[1])
    shards = []
    for index in range(int(np.prod(matrix))):
        shard = shard_of("w", full.shape, stored, layout(matrix, axes), index)
        shards.append((index, shard, shard.cut(full)))
    again, difference = gather("w", full.shape, shards)
    assert np.array_equal(again, full) and difference == 0


def test_copies_that_differ_are_measured():
    shard = shard_of("w", (4,), (4,), layout([2], [-1]), 0)
    full, difference = gather("w", (4,), [(0, shard, np.zeros(4)), (1, shard, np.array([0, 0, 0.5, 0]))])
    assert difference == 0.5


def test_missing_part_is_an_error():
    shard = shard_of("w", (4,), (2,), layout([2], [0]), 0)
    with pytest.raises(ValueError, match="parameter 'w': 2 of 4 elements are on no rank"):
        gather("w", (4,), [(0, shard, np.zeros(2))])


def test_stored_shape_that_does_not_follow_is_an_error():
    with pytest.raises(ValueError, match=r"parameter 'w' is stored as \(4, 2\), its layout cuts \(4, 6\) to \(4, 3\)"):
        shard_of("w", (4, 6), (4, 2), layout([2], [-1, 0]), 0)


def test_states_use_the_layout_of_their_weight():
    layouts = {"model.w": layout([2], [0])}
    assert layout_for("adam_m.model.w", layouts) is layouts["model.w"]
    assert layout_for("global_step", layouts) is None
