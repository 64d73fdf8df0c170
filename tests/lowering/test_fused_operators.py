"""Ascend's fused operators on hand-made graphs: what the lowering makes of them, and what it refuses."""

import numpy as np
import pytest
from helpers.mindir_model import Model
from mindspore import Tensor

from mindformers_ext.first_hour.one_operator import as_cell
from mindformers_ext.rank_compiler import mind_ir as pb


def attention(mode: int, before: int, after: int, queries: int = 16) -> Model:
    model = Model()
    for name, length in (("q", queries), ("k", 16), ("v", 16)):
        model.apply("ReLU", [f"{name}_in"], name, (2, 4, length, 24))
    rest = [None] * 3 + ["mask"] + [None] * 3 + [4, 1.0, 0.25, before, after, 0, 1, mode]
    names = [x if x == "mask" else model.constant(f"c{i}", x) for i, x in enumerate(rest)]
    shapes = [(2, 4, queries, 8)] * 2 + [(1,), (2, 4, queries, 24)]
    model.apply("FlashAttentionScore", ["q", "k", "v", *names], "out", *shapes)
    return model


@pytest.mark.parametrize(
    ("mode", "after", "queries", "diagonal"), [(2, 0, 16, 0), (3, 0, 8, 8), (4, 0, 8, 8), (4, -8, 8, 0)]
)
def test_causal_attention(mode, after, queries, diagonal):
    kernel, inputs, attributes = attention(mode, 2**31 - 1, after, queries).lowered("out")
    assert (kernel, inputs) == ("FlashAttentionScore", ["q", "k", "v"])
    assert float(attributes["scale"]) == 0.25 and float(attributes["diagonal"]) == diagonal


def test_attention_with_a_mask():
    assert attention(0, 0, 0).lowered("out")[:2] == ("FlashAttentionScore", ["q", "k", "v", "mask"])


@pytest.mark.parametrize(("mode", "to_last"), [(2, 0), (3, 1)])
def test_attention_of_packed_tokens(mode, to_last):
    """Layout TND, number 4 of MindSpore's: the ends of documents are tuples that tensors are made into."""
    model = Model()
    ends = [model.apply("TensorToTuple", [name], f"{name}_tuple", (3,)) for name in ("ends", "key_ends")]
    places = [model.constant(f"place{i}", i) for i in range(3)]  # a function's arguments are the items
    items = [model.apply("TupleGetItem", [ends[1], place], f"item{i}", ()) for i, place in enumerate(places)]
    ends[1] = model.apply("MakeTuple", items, "again", (3,))
    numbers = [model.constant(f"c{i}", x) for i, x in enumerate((4, 1.0, 0.25, 2**31 - 1, 0, 0, 4, mode))]
    none = [model.constant(f"none{i}", None) for i in range(3)]
    shapes = [(32, 4, 8)] * 2 + [(1,), (32, 4, 24)]
    inputs = ["q", "k", "v", *none, "mask", model.constant("prefix", None), *ends, *numbers]
    model.apply("FlashAttentionScore", inputs, "out", *shapes)
    kernel, inputs, attributes = model.lowered("out")
    assert (kernel, inputs) == ("PackedAttention", ["q", "k", "v", "ends", "key_ends"])
    assert (float(attributes["scale"]), float(attributes["to_last"])) == (0.25, to_last)


def test_attention_that_no_kernel_knows_is_refused():
    with pytest.raises(ValueError, match="sparse_mode 7"):
        attention(7, 0, 0).lowered("out")
    with pytest.raises(ValueError, match="band of 3 earlier keys"):
        attention(4, 3, 0).lowered("out")


def test_rms_norm_takes_its_epsilon():
    model = Model()
    model.apply("RmsNorm", ["x", "w", model.constant("eps", 0.5)], "out", (4, 8), (4, 1))
    kernel, inputs, attributes = model.lowered("out")
    assert (kernel, inputs, attributes["eps"]) == ("RmsNorm", ["x", "w"], "0.5")


def grouped_matmul(kind: int, transposed: str) -> Model:
    model = Model()
    axes = [model.constant("last", -1), model.constant("before", -2)]
    operands = {"x": "x", "w": "w"}
    if transposed:
        operands[transposed] = model.apply("TransposeExtView", [transposed, *axes], "turned", (8, 4))
    tuples = [model.apply("MakeTuple", [operand], f"{name}_tuple", (4, 8)) for name, operand in operands.items()]
    nothing = [model.constant(f"none{i}", None) for i in range(5)]
    numbers = [model.constant(f"n{i}", value) for i, value in enumerate((3, kind, 0, 0))]
    model.apply("GroupedMatmul", [*tuples, *nothing, "ends", *numbers], "made", (4, 6))
    model.apply("TupleGetItem", ["made", model.constant("zero", 0)], "out", (4, 6))
    return model


@pytest.mark.parametrize(
    ("kind", "transposed", "kernel"),
    [(0, "", "GroupedMatmul"), (0, "w", "GroupedMatmulInputGrad"), (2, "x", "GroupedMatmulWeightGrad")],
)
def test_grouped_matmul_and_its_gradients(kind, transposed, kernel):
    model = grouped_matmul(kind, transposed)
    assert model.lowered("made/element")[:2] == (kernel, ["x", "w", "ends"])
    nodes = {node.output[0]: node for node in model.proto.graph.node}
    assert list(nodes["made"].input) == ["made/element"] and list(nodes["out"].input) == ["made", "zero"]


def test_a_sum_over_groups_needs_a_transpose():
    with pytest.raises(ValueError, match="first input is not a transpose"):
        grouped_matmul(2, "").lowered("made")


def test_numbers_are_added_at_places(tmp_path):
    """ScatterAddExt has no CPU kernel of MindSpore's: the lowered operator against numpy."""
    model = Model()
    x, places = model.given("x", "float", (3, 5)), model.given("places", "int32", (3, 1))
    values = model.given("values", "float", (3, 1))
    model.apply("ScatterAddExt", [x, model.constant("axis", 1), places, values], "out", (3, 5))
    model.proto.graph.name = "add"
    known = dict(ir_version="1.1", producer_name="tests", model_version="2.9.0", mind_ir_version=3)
    model.proto.MergeFrom(pb.ModelProto(**known, little_endian=True))
    cell = as_cell(model.proto, tmp_path / "one.mindir", on_cpu=True)
    rng = np.random.default_rng(0)
    given = rng.random((3, 5), np.float32), np.array([[4], [0], [2]], np.int32), rng.random((3, 1), np.float32)
    want = given[0].copy()
    np.add.at(want, (np.arange(3)[:, None], given[1]), given[2])
    assert np.array_equal(cell(*map(Tensor, given)).asnumpy(), want)
