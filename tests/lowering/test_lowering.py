"""Lowering and inlining on hand-made graphs: what becomes of calls, closures, collectives and run-time branches."""

import pytest

from mindformers_ext.lowering.graph import set_attribute
from mindformers_ext.lowering.inlining import inline_functions
from mindformers_ext.lowering.lower import lower
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import attributes_of


def primitive(model: pb.ModelProto, name: str, operator: str, **attributes) -> None:
    added = model.primitives.add(name=name, op_type=operator, prim_type=pb.PrimitiveProto.PRIMITIVE)
    for key, value in attributes.items():
        set_attribute(added, key, value)


def node(graph: pb.GraphProto, applied: str, inputs: list[str], output: str, shape: tuple[int, ...] = (4,)) -> None:
    added = graph.node.add(op_type=f"REF::{applied}", input=inputs, output=[output], name=output)
    attribute = added.attribute.add(name="shape", type=pb.AttributeProto.TENSORS)
    attribute.tensors.add(dims=shape, data_type=pb.TensorProto.FLOAT)


def graph_with(model: pb.ModelProto, graph: pb.GraphProto, inputs: list[str], output: str) -> pb.GraphProto:
    for name in inputs:
        graph.input.add(name=name)
    graph.output.add(name=output)
    return graph


def function(model: pb.ModelProto, name: str, inputs: list[str], output: str) -> pb.GraphProto:
    added = model.functions.add(name=name)
    return graph_with(model, added, inputs, output)


@pytest.fixture
def model() -> pb.ModelProto:
    """main(x): two calls of block(x), whose closure `back` is bound to its input; both closures run afterwards."""
    made = pb.ModelProto()
    primitive(made, "Relu:0", "ReLU")
    primitive(made, "Neg:0", "Neg")
    primitive(made, "Partial:0", "Partial")
    primitive(made, "MakeTuple:0", "MakeTuple")
    primitive(made, "TupleGetItem:0", "TupleGetItem")
    main = graph_with(made, made.graph, ["x"], "g1")
    for name, value in (("zero", 0), ("one", 1)):
        constant = main.node.add(op_type="Constant", output=[name])
        constant.attribute.add(name="value", i=value, type=pb.AttributeProto.INT64)
    block = function(made, "block", ["b"], "pair")
    node(block, "Relu:0", ["b"], "y")
    node(block, "Partial:0", ["back", "y"], "closure")
    node(block, "MakeTuple:0", ["y", "closure"], "pair")
    back = function(made, "back", ["saved", "d"], "n")
    node(back, "Neg:0", ["d", "saved"], "n")
    for i, given in enumerate(("x", "y0")):
        node(main, "block", [given], f"call{i}")
        node(main, "TupleGetItem:0", [f"call{i}", "zero"], f"y{i}")
        node(main, "TupleGetItem:0", [f"call{i}", "one"], f"c{i}")
    node(main, "c1", ["y1"], "g0")
    node(main, "c0", ["g0"], "g1")
    return made


def operators(model: pb.ModelProto) -> list[tuple[str, list[str], str]]:
    known = {p.name: p.op_type for p in model.primitives}
    return [
        (known.get(n.op_type[5:], n.op_type), list(n.input), n.output[0])
        for n in model.graph.node
        if n.op_type != "Constant"
    ]


def test_calls_and_closures_become_one_flat_graph(model):
    inline_functions(model)
    assert not model.functions
    assert operators(model) == [
        ("ReLU", ["x"], "call1/y"),
        ("ReLU", ["call1/y"], "call2/y"),
        ("Neg", ["call2/y", "call2/y"], "call3/n"),
        ("Neg", ["call3/n", "call1/y"], "call4/n"),
    ]
    assert model.graph.output[0].name == "call4/n"


def test_run_time_branch_stays_a_function(model):
    primitive(model, "Switch:0", "Switch")
    node(model.graph, "Switch:0", ["x", "c0", "c1"], "chosen")
    node(model.graph, "chosen", ["x"], "branch")
    model.graph.output[0].name = "branch"
    inline_functions(model)
    assert [kept.name for kept in model.functions] == ["back"]
    *_, first, second, switch = operators(model)[:-1]
    assert first == ("Partial", ["back", "call1/y"], first[2])
    assert second == ("Partial", ["back", "call2/y"], second[2])
    assert switch == ("Switch", ["x", first[2], second[2]], "chosen")
    assert model.graph.node[-1].op_type == "REF::chosen"


def test_collectives_are_chained_custom_operators(model):
    primitive(model, "Sum:0", "AllReduce", op="sum", group_rank_ids=(0, 2), group="tp")
    primitive(model, "Send:0", "Send", group_rank_ids=(0, 2), dest_rank=1, sr_tag=7)
    node(model.graph, "Sum:0", ["y0"], "s0")
    node(model.graph, "Sum:0", ["s0"], "s1")
    node(model.graph, "Send:0", ["s1"], "sent")
    calls = lower(model, rank=0, world_size=4)
    assert [(c.operation, c.ranks, c.elements, c.bytes) for c in calls] == [
        ("AllReduce", (0, 2), 4, 16),
        ("AllReduce", (0, 2), 4, 16),
        ("Send", (0, 2), 4, 16),
    ]
    customs = [entry for entry in operators(model) if entry[0] == "Custom"]
    assert customs == [
        ("Custom", ["call1/y"], "s0"),
        ("Custom", ["s0", "s0"], "s1"),
        ("Custom", ["s1", "s1"], "sent"),
    ]
    attributes = [attributes_of(p) for p in model.primitives if p.op_type == "Custom"]
    assert [a["collective"] for a in attributes] == ["AllReduce", "AllReduce", "Send"]
    assert attributes[0]["rank_list"] == [0, 2] and attributes[0]["reduce"] == "sum"
    assert attributes[2]["peer"] == 2 and attributes[2]["tag"] == 7
    assert all(a["func_name"].endswith(":Collective") and a["func_type"] == "aot" for a in attributes)


def test_group_without_ranks_is_named(model):
    primitive(model, "Sum:0", "AllReduce", op="sum", group="mystery")
    node(model.graph, "Sum:0", ["y0"], "s0")
    with pytest.raises(ValueError, match="'AllReduce' .* does not say which ranks its group has"):
        lower(model, 0, 4)


def test_world_group_needs_no_list(model):
    primitive(model, "Sum:0", "AllReduce", op="max", group="hccl_world_group")
    node(model.graph, "Sum:0", ["y0"], "s0")
    (call,) = lower(model, 0, 3)
    assert call.ranks == (0, 1, 2) and call.detail == (("reduce", "max"),)


def test_collective_behind_a_branch_is_refused(model):
    primitive(model, "Switch:0", "Switch")
    primitive(model, "Sum:0", "AllReduce", op="sum", group="hccl_world_group")
    (back,) = (f for f in model.functions if f.name == "back")
    node(back, "Sum:0", ["n"], "s")
    node(model.graph, "Switch:0", ["x", "c0", "c1"], "chosen")
    node(model.graph, "chosen", ["x"], "branch")
    with pytest.raises(ValueError, match="'AllReduce' .* is in function 'back', which runs only when"):
        lower(model, 0, 2)


def test_a_gradient_is_taken_behind_all_its_additions():
    """As MindSpore writes two micro-batches: additions bound by zeros only, then the reduction of the buffer."""
    model = pb.ModelProto()
    for operator in ("AssignAdd", "Depend", "AddN", "Neg"):
        primitive(model, f"{operator}:0", operator)
    main = graph_with(model, model.graph, ["buffer", "dw0", "dw1", "zero"], "reduced")
    for i in range(2):
        node(main, "AssignAdd:0", ["buffer", f"dw{i}"], f"sum{i}")
        node(main, "Depend:0", ["zero", f"sum{i}"], f"zero{i}")
    node(main, "AddN:0", ["zero0", "zero1"], "zeros")
    node(main, "Depend:0", ["buffer", "zeros"], "ready")
    node(main, "Neg:0", ["ready"], "reduced")
    lower(model, 0, 1)
    made = {output: (operator, inputs) for operator, inputs, output in operators(model)}
    assert made["sum0"] == ("AssignAdd", ["buffer", "dw0"])
    assert made["sum1"] == ("AssignAdd", ["sum1/after0", "dw1"])
    assert made["sum1/after0"] == ("Depend", ["buffer", "sum0"])
    assert made["ready"] == ("Depend", ["ready/after0", "zeros"])
    assert made["ready/after0"] == ("Depend", ["buffer", "sum1"])
    assert made["reduced"] == ("Neg", ["ready"])  # which is behind it already


def test_an_addition_to_a_buffer_that_waits_counts_too():
    """As schedulers write it: the second addition waits for something else first (zero_bubble_v lost its gradient)."""
    model = pb.ModelProto()
    for operator in ("AssignAdd", "Depend", "Neg"):
        primitive(model, f"{operator}:0", operator)
    main = graph_with(model, model.graph, ["buffer", "dw0", "dw1", "message"], "reduced")
    node(main, "AssignAdd:0", ["buffer", "dw0"], "sum0")
    node(main, "Depend:0", ["buffer", "message"], "later")
    node(main, "AssignAdd:0", ["later", "dw1"], "sum1")
    node(main, "Neg:0", ["buffer"], "reduced")
    lower(model, 0, 1)
    made = {output: (operator, inputs) for operator, inputs, output in operators(model)}
    assert made["later"] == ("Depend", ["later/after0", "message"])
    assert made["later/after0"] == ("Depend", ["buffer", "sum0"])
    assert made["sum1"] == ("AssignAdd", ["later", "dw1"])
    assert made["reduced/after0"] == ("Depend", ["buffer", "sum1"])
