"""What operators cost, against counts made by hand."""

from types import SimpleNamespace

import pytest

from mindformers_ext.dryrun.rooflines import operator_rows, part_rows, roofline_record, roofline_text
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.roofline import ATTENTION, MEMORY, PRODUCT, VIEW, Work, count_operators
from tests.helpers.mindir_model import Model

FLOAT, HALF = 4, 2
RATES = SimpleNamespace(peak_tflops=1.0, matmul_efficiency=0.5, attention_efficiency=0.25, hbm_gb_per_s=1.0)


def given(model: Model, **tensors) -> list[str]:
    return [model.given(name, *tensor) for name, tensor in tensors.items()]


def work(model: Model, operator: str) -> Work:
    (found,) = (w for w in count_operators(model.proto) if w.operator == operator)
    return found


def test_products_count_their_inner_axis_whichever_side_is_transposed():
    for left, right in (((16, 32), (32, 8)), ((32, 16), (32, 8)), ((16, 32), (8, 32))):
        model = Model()
        model.apply("MatMul", given(model, a=("float", left), b=("float", right)), "c", (16, 8))
        assert work(model, "MatMul").flops == 2 * 16 * 32 * 8
        assert work(model, "MatMul").bytes == FLOAT * (16 * 32 + 32 * 8 + 16 * 8)
        assert work(model, "MatMul").kind == PRODUCT


def grouped(x, weight, result) -> Work:
    model = Model()
    a, b, g = given(model, a=("bfloat16", x), b=("bfloat16", weight), groups=("int64", (4,)))
    none = model.constant("none", None)
    tuples = [model.apply("MakeTuple", [value], f"of_{value}") for value in (a, b)]
    model.apply("GroupedMatmul", [*tuples, none, none, none, none, none, g], "c", result)
    return work(model, "GroupedMatmul")


def test_grouped_products_count_the_rows_of_a_balanced_routing():
    """A buffer of 1024 rows, of which balance fills 128."""
    forward = grouped((1024, 16), (4, 16, 8), (1024, 8))
    weight_gradient = grouped((16, 1024), (1024, 8), (4, 16, 8))
    for whole, part in ((forward, forward.balanced(128)), (weight_gradient, weight_gradient.balanced(128))):
        assert whole.flops == 2 * 1024 * 16 * 8 and part.flops == 2 * 128 * 16 * 8
    weight, groups = 4 * 16 * 8 * HALF, 4 * 8
    assert forward.bytes == 1024 * (16 * HALF + 8 * FLOAT) + weight + groups
    assert forward.balanced(128).bytes == 128 * (16 * HALF + 8 * FLOAT) + weight + groups
    assert forward.balanced(4096) == grouped((1024, 16), (4, 16, 8), (1024, 8)).balanced(1024), "never more than all"


def test_lengths_that_the_device_knows_are_those_of_a_balanced_routing():
    dynamic = grouped((-1, 16), (4, 16, 8), (-1, 8)).balanced(128)
    static = grouped((1024, 16), (4, 16, 8), (1024, 8)).balanced(128)
    assert (dynamic.flops, dynamic.bytes) == (static.flops, static.bytes)
    model = Model()
    model.apply("Swiglu", given(model, x=("bfloat16", (-1, 16))), "y", (-1, 8))
    assert work(model, "Swiglu").balanced(128).bytes == 128 * (16 * HALF + 8 * FLOAT)


@pytest.mark.parametrize(("mode", "share"), [(2, 0.5), (0, 1)])
def test_attention_counts_what_its_mask_leaves(mode, share):
    model = Model()
    shapes = {"q": ("bfloat16", (2, 4, 64, 24)), "k": ("bfloat16", (2, 4, 32, 24)), "v": ("bfloat16", (2, 4, 32, 16))}
    names = given(model, **shapes)
    names += [model.constant(f"none{i}", None) for i in range(7)]
    names += [model.constant(f"n{i}", value) for i, value in enumerate((4, 1.0, 1.0, 0, 0, 0, 1, mode))]
    model.apply("FlashAttentionScore", names, "out", (2, 4, 64, 8), (2, 4, 64, 8), (1,), (2, 4, 64, 16))
    found = work(model, "FlashAttentionScore")
    assert found.kind == ATTENTION and found.flops == share * 2 * (2 * 4) * 64 * 32 * (24 + 16)


def test_kernels_move_what_they_touch():
    model = Model()
    x, ids = given(model, x=("float", (1000, 8)), ids=("int32", (10,)))
    parameter = model.given("parameter", "float", (1000, 8))
    model.apply("Gather", [x, ids, model.constant("axis", 0)], "rows", (10, 8))
    model.apply("Reshape", ["rows"], "flat", (80,))
    model.apply("Assign", [parameter, x], "assigned", (1000, 8))
    model.apply("InplaceIndexAddExt", [parameter, ids, "rows"], "added", (1000, 8))
    rows, whole, index = 10 * 8 * FLOAT, 1000 * 8 * FLOAT, 10 * 4
    assert work(model, "Gather").bytes == 2 * rows + index
    assert work(model, "Reshape").bytes == 0 and work(model, "Reshape").kind == VIEW
    assert work(model, "Assign").bytes == 2 * whole
    assert work(model, "InplaceIndexAddExt").bytes == 3 * rows + index


def test_fusion_takes_what_only_element_wise_kernels_read():
    """x -> square -> (a view of it, negated; and exp) -> sum; the product's result is summed into a buffer."""
    model = Model()
    x, w, buffer = given(model, x=("float", (8, 8)), w=("float", (8, 8)), buffer=("float", (8, 8)))
    model.apply("Square", [x], "square", (8, 8))
    model.apply("Reshape", ["square"], "view", (64,))
    model.apply("Neg", ["view"], "neg", (64,))
    model.apply("Exp", ["square"], "exp", (8, 8))
    model.apply("SumExt", ["exp"], "sum", (8,))
    model.apply("MatMul", [x, w], "gradient", (8, 8))
    model.apply("AssignAdd", [buffer, "gradient"], "out", (8, 8))
    size = 8 * 8 * FLOAT
    saved = {w.operator: w.fusion_bytes for w in count_operators(model.proto)}
    assert saved["Square"] == 3 * size, "written once and read twice"
    assert saved["Exp"] == 0, "a reduction reads it"
    assert saved["MatMul"] == 2 * size and saved["AssignAdd"] == 0


def test_a_gradient_is_added_inside_its_product_where_flags_say_so():
    """dW (8, 4) bfloat16 <- x^T (8, 16), dy (16, 4), added to a float32 buffer: read and written in place of dW."""
    model = Model()
    x, dy, buffer = given(model, x=("bfloat16", (16, 8)), dy=("bfloat16", (16, 4)), buffer=("float", (8, 4)))
    turns = [model.constant("a", 1), model.constant("b", 0)]
    model.apply("MatMul", [x, dy, *turns], "gradient", (8, 4))
    model.proto.graph.node[-1].attribute[0].tensors[0].data_type = pb.TensorProto.BFLOAT16
    model.apply("AssignAdd", [buffer, "gradient"], "out", (8, 4))
    operands, gradient = HALF * (16 * 8 + 16 * 4), 8 * 4
    found = {flags: count_operators(model.proto, flags) for flags in ("", "--enable_pass=matmul_assignadd_fusion")}
    apart, (joined,) = found.values()
    assert [w.operator for w in apart] == ["MatMul", "AssignAdd"] and apart[0].bytes == operands + HALF * gradient
    assert joined.operator == "InplaceMatMulAdd" and joined.bytes == operands + 2 * FLOAT * gradient
    assert joined.flops == apart[0].flops


def test_a_record_sums_a_micro_batch_by_kind_and_part():
    product = Work("MatMul", "", "", "", "attention", PRODUCT, True, 1e12, 1e6, 0, 0, 0, count=4)
    moves = Work("Add", "", "", "", "router", MEMORY, True, 0, 1e9, 5e8, 0, 0, count=2)
    update = Work("ApplyAdamW", "", "", "", "optimizer", MEMORY, False, 0, 3e9, 0, 0, 0, count=1)
    view = Work("Reshape", "", "", "", "router", VIEW, True, 0, 0, 0, 0, 0, count=9)
    record = roofline_record([product, moves, update, view], RATES, rows=0, micro_batches=2)
    assert record["seconds_by_kind"] == {PRODUCT: 4.0, ATTENTION: 0, MEMORY: 1.0}
    assert (record["micro_batch_seconds"], record["once_seconds"], record["fusion_seconds"]) == (5.0, 3.0, 0.5)
    assert record["kernels"] == 3 and record["memory_bytes"] == 1e9
    assert [row[0] for row in part_rows(record)] == ["attention", "router"]
    assert [row[4] for row in operator_rows(record)] == ["MatMul", "Add"]
    assert "at least 5000.0 ms" in roofline_text(record)
