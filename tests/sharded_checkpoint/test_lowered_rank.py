"""A rank on CPU loads and saves its parts only, as a rank of a card does."""

from collections import Counter
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter

from mindformers_ext.cpu_parallel.lowered_step import StoredParameter
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.network import load_into, pieces_of, state_of
from mindformers_ext.sharded_checkpoint.shards import Slot

WHOLE = {
    "model.w": np.arange(32, dtype=np.float32).reshape(8, 4),
    "model.bias": np.ones(4, np.float32),
    "global_step": np.array([7], np.int32),
}


def parameter(name: str, value: np.ndarray) -> Parameter:
    return Parameter(ms.Tensor(value), name=name)


class LoweredStep:
    """The face of LoweredTrainStep: a whole model, of which this rank's graph has rows 4 to 8 and the whole bias."""

    def __init__(self, stages: int):
        self.job = SimpleNamespace(rank=3, stages=stages)
        self.whole = {name: parameter(name, np.zeros_like(value)) for name, value in WHOLE.items()}
        self.part = parameter("model.w", np.zeros((4, 4), np.float32))

    def get_parameters(self):
        return iter(self.whole.values())

    def stored(self):
        yield "model.w", StoredParameter(self.part, Slot((8, 4), ((4, 8), (0, 4)), copy=1))
        yield "model.bias", StoredParameter(self.whole["model.bias"], Slot((4,), ((0, 4),), copy=3))


class Counting:
    """Whole values; counts the elements that are read of each."""

    path = "memory"

    def __init__(self, values: dict[str, np.ndarray]):
        self.values, self.read_elements = values, Counter()

    def names(self):
        return self.values.keys()

    def read(self, name: str):
        def cut(_, index):
            part = self.values[name][index]
            self.read_elements[name] += part.size
            return part

        return type("Lazy", (), {"shape": self.values[name].shape, "__getitem__": cut})()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_rank_reads_and_saves_its_parts(stages: int) -> None:
    step, source = LoweredStep(stages), Counting(WHOLE)
    load_into(step, state_of(step), source)
    assert source.read_elements == {"model.w": 16, "model.bias": 4, "global_step": 1}
    assert not step.whole["model.w"].asnumpy().any(), "the model's copy is not read"
    pieces = pieces_of(step)
    np.testing.assert_array_equal(pieces["model.w"].array, WHOLE["model.w"][4:])
    assert {name: (piece.slot.full_shape, piece.slot.copy) for name, piece in pieces.items()} == {
        "model.w": ((8, 4), 1),
        "model.bias": ((4,), 3),
        "global_step": ((1,), 3),
    }
    more = Counting(WHOLE | {"model.other": np.zeros(2, np.float32)})
    if stages == 2:  # may be another stage's
        load_into(step, state_of(step), more)
    else:
        with pytest.raises(ConfigError, match="holds 1 weights that this model lacks: model.other"):
            load_into(step, state_of(step), more)
