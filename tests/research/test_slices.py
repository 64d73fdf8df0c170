"""No slice of a concatenation along its axis, where that is not counted from the end: MindSpore 2.9's parallel compiler
(MergeConcatSlice) takes one of the joined pieces in its place, and does not look at where the slice begins.
"""

import mindspore as ms
import numpy as np
import pytest
from deepseek3_model import DeepseekV3ForCausalLM, ShiftLeft
from mindspore import Tensor, ops

from tests.helpers.small_models import v3_config


@pytest.fixture
def sliced_joins(monkeypatch):
    """(Concat's axis, begin, end) of every slice that took a concatenation's result as it was, in order of calls."""
    joined, found = {}, []
    concat, slices = ops.Concat.__call__, ops.StridedSlice.__call__

    def join(self, *arguments):
        result = concat(self, *arguments)
        joined[id(result)] = (self.axis, result)  # held, or another tensor could get its number
        return result

    def cut(self, x, begin, end, strides):
        axis, whole = joined.get(id(x), (-1, None))
        if axis >= 0 and (begin[axis], end[axis]) != (0, whole.shape[axis]):
            found.append((axis, begin, end))
        return slices(self, x, begin, end, strides)

    monkeypatch.setattr(ops.Concat, "__call__", join)
    monkeypatch.setattr(ops.StridedSlice, "__call__", cut)
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield found
    ms.set_context(mode=mode)


def test_the_model_slices_no_concatenation(sliced_joins):
    config = v3_config(mtp_depth=3)
    tokens = np.arange(2 * config.seq_length, dtype=np.int32).reshape(2, -1) % config.vocab_size
    model = DeepseekV3ForCausalLM(config).set_train()
    model(Tensor(tokens), Tensor(tokens), Tensor(np.ones_like(tokens, np.float32)))
    assert sliced_joins == []


def test_a_shift_of_a_shift_is_found(sliced_joins):
    shift, x = ShiftLeft(v3_config()), Tensor(np.ones((2, 8), np.float32))
    shift(shift(x, 1, 0), 1, 0)
    assert sliced_joins == [(1, (0, 1), (2, 8)), (1, (0, 7), (2, 8))]
