"""Collectives of a lowered graph: which wait for each other, and which become one operator."""

from lowering.test_lowering import graph_with, node, operators, primitive

from mindformers_ext.lowering.lower import lower
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import attributes_of


def test_collectives_that_need_each_other_not_become_one():
    """Two gathered weights, an activation between them, two gradients that are scattered at the end."""
    model = pb.ModelProto()
    primitive(model, "Gather:0", "AllGather", group="hccl_world_group")
    primitive(model, "Sum:0", "AllReduce", op="sum", group="hccl_world_group")
    primitive(model, "Scatter:0", "ReduceScatter", op="sum", group="hccl_world_group")
    primitive(model, "Mul:0", "Mul")
    main = graph_with(model, model.graph, ["x", "w0", "w1"], "both")
    node(main, "Gather:0", ["w0"], "full0", (8,))
    node(main, "Mul:0", ["x", "full0"], "y0", (8,))
    node(main, "Sum:0", ["y0"], "s0", (8,))
    node(main, "Gather:0", ["w1"], "full1", (6,))
    node(main, "Mul:0", ["s0", "full1"], "y1", (8,))
    node(main, "Scatter:0", ["y1"], "d1", (4,))
    node(main, "Mul:0", ["y1", "y0"], "z", (8,))
    node(main, "Scatter:0", ["z"], "d0", (4,))
    node(main, "Mul:0", ["d0", "d1"], "both", (4,))
    calls = lower(model, 0, 2)
    assert [(call.operation, call.elements) for call in calls] == [
        ("AllGather", 14),
        ("AllReduce", 8),
        ("ReduceScatter", 8),
    ]
    assert calls[0].detail == (("elements", (8, 6)),) and calls[2].detail == (("reduce", "sum"), ("elements", (4, 4)))
    made = {output: (operator, inputs) for operator, inputs, output in operators(model)}
    assert made["full0/together"] == ("Custom", ["w0", "w1"])
    assert made["s0"] == ("Custom", ["y0", "full0/together"])
    assert made["d1/together"] == ("Custom", ["y1", "z", "s0"])
    assert made["full1"][0] == made["d0"][0] == "TupleGetItem"
    attributes = [attributes_of(p) for p in model.primitives if p.op_type == "Custom"]
    assert sorted(a["tensors"] for a in attributes if "tensors" in a) == [2, 2]
    seen = set()
    for entry in model.graph.node:
        assert all(name in seen or name not in made for name in entry.input)
        seen.add(entry.output[0])
