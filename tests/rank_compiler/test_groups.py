"""Which ranks a collective of a compiled graph joins."""

import mindspore.train.mind_ir_pb2 as pb
import pytest

from mindformers_ext.lowering.graph import set_attribute
from mindformers_ext.rank_compiler.mindir import attributes_of, correct_groups

WORLD = tuple(range(8))


@pytest.mark.parametrize(
    ("operator", "size", "written", "right"),
    [
        ("AllGather", 2, WORLD, (2, 3)),  # a group that the model made: the compiler writes all ranks
        ("AllGather", 2, (4, 5), (4, 5)),  # its own
        ("AlltoAllV", None, WORLD, (2, 3)),  # never says how many
        ("AllReduce", None, WORLD, (2, 3)),
        ("AllReduce", None, (2, 3), (2, 3)),
    ],
)
def test_groups_of_the_model_get_their_own_ranks(operator, size, written, right):
    model = pb.ModelProto()
    primitive = model.primitives.add(name="one", op_type=operator)
    set_attribute(primitive, "group", "experts")
    set_attribute(primitive, "group_rank_ids", written)
    if size is not None:
        set_attribute(primitive, "rank_size", size)
    assert correct_groups(model, {"experts": [2, 3]}.__getitem__) == (written != right)
    assert tuple(attributes_of(primitive)["group_rank_ids"]) == right
