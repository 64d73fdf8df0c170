"""What the C++ extension refuses (tests/bin_dataset/sanitized_calls.py has every entry point and value)."""

import numpy as np
import pytest

from mindformers_ext.bin_dataset import _index_builder
from mindformers_ext.bin_dataset.blended_dataset import parse_blend

NONE = np.empty(0, np.int64)


@pytest.mark.parametrize(
    "weights,sizes,words",
    [
        ([float("nan"), 1], NONE, "weight 0 is nan"),
        ([1, float("inf")], NONE, "weight 1 is inf"),
        ([0.5, -0.5], NONE, "weight 1 is -0.5"),
        ([0.5, 0.5], np.array([50, 49]), "the sizes are 1 fewer than the 100 samples asked for"),
        ([0.5, 0.5], np.array([200, -1]), "size 1 is negative"),
    ],
)
def test_blends_that_cannot_be_are_refused(weights, sizes, words):
    with pytest.raises(ValueError, match=words):
        _index_builder.build_blend_indices(np.array(weights), 100, sizes)


@pytest.mark.parametrize("weight", ["nan", "inf", "-1", "0"])
def test_a_weight_in_data_path_is_a_positive_number(weight):
    with pytest.raises(ValueError, match=f"data_path gives b the weight {float(weight):g}"):
        parse_blend(["1", "a", weight, "b"])
