"""AdamW's update in a lowered graph: one operator where the function is AdamW and nothing else, else untouched."""

import struct

import pytest

from mindformers_ext.lowering.fused_update import fuse_updates
from mindformers_ext.lowering.graph import Graph, set_attribute
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import attributes_of


class Function:
    """A function of a model, as MindSpore writes MindFormers' AdamW for the weights `w0`, `w1` ..."""

    def __init__(self, weights: int, decays: tuple[float, ...]):
        self.model = pb.ModelProto()
        self.proto = self.model.functions.add(name="update")
        states = [f"{kind}{i}" for i in range(weights) for kind in ("w", "m", "v", "g")]
        for name in (*states, "step", "lr", "loss"):
            self.proto.input.add(name=name)
        for name, kind in (("u", "UMonadType"), ("io", "IOMonadType")):
            self.proto.input.add(name=name, denotation=kind)
        for name, value in dict(b1=0.9, r1=0.1, b2=0.95, r2=0.05, eps=1e-8, one=1.0).items():
            self.constant(name, value)
        self.apply("AssignAdd", ["step", "one", "u"], "counted")
        self.apply("Load", ["step", "u"], "t")
        self.apply("Cast", ["t", "float"], "t32")
        for i, decay in zip(range(weights), decays, strict=True):
            self.weight(i, decay)
        self.apply("Depend", ["loss", "counted"], "after")
        self.apply("Depend", ["after", "io"], "out")
        self.proto.output.add(name="out")

    def constant(self, name: str, value: float) -> None:
        node = self.proto.node.add(op_type="Constant", output=[name], name=name)
        attribute = node.attribute.add(name="value", type=pb.AttributeProto.TENSORS)
        attribute.tensors.add(dims=[1], data_type=pb.TensorProto.FLOAT, raw_data=struct.pack("<f", value))

    def apply(self, operator: str, inputs: list[str], output: str) -> str:
        primitive = self.model.primitives.add(name=f"P{output}", op_type=operator)
        primitive.prim_type = pb.PrimitiveProto.PRIMITIVE
        if operator.startswith("Assign"):
            set_attribute(primitive, "side_effect_mem", True)
        self.proto.node.add(op_type=f"REF::P{output}", input=inputs, output=[output], name=output)
        return output

    def weight(self, i: int, decay: float) -> None:
        def make(operator: str, *inputs: str) -> str:
            return self.apply(operator, list(inputs), f"n{len(self.proto.node)}")

        w, m, v, g = (f"{kind}{i}" for kind in "wmvg")
        new = make("Add", make("Mul", make("Load", m, "u"), "b1"), make("Mul", g, "r1"))
        make("Assign", m, new, "u")
        make("Assign", v, make("Addcmul", make("Mul", make("Load", v, "u"), "b2"), g, g, "r2"), "u")
        power1, power2 = (make("Sub", "one", make("Pow", beta, "t32")) for beta in ("b1", "b2"))
        root = make("Add", make("Sqrt", make("Div", make("Load", v, "u"), power2)), "eps")
        change = make("Mul", make("Div", make("Load", m, "u"), root), make("Div", "lr", power1))
        kept = make("Load", w, "u")
        if decay:
            self.constant(f"decay{i}", decay)
            kept = make("Mul", kept, make("Sub", "one", make("Mul", "lr", f"decay{i}")))
        make("Assign", w, make("Sub", kept, change), "u")

    def fused(self) -> list[pb.NodeProto]:
        graph = Graph(self.model, 0, 1)
        fuse_updates(graph)
        return [n for n in self.proto.node if "func_name" in attributes_of(graph.primitive(n) or pb.PrimitiveProto())]


def test_adamw_becomes_one_operator():
    function = Function(2, (0.1, 0.0))
    (update,) = function.fused()
    step, rate, factor, decay, *tensors, state = update.input
    assert (step, rate, state) == ("step", "lr", "u")
    assert tensors == ["w0", "w1", "m0", "m1", "v0", "v1", "g0", "g1"]
    constants = {n.output[0]: n.attribute[0].tensors[0].raw_data for n in function.proto.node if n.attribute}
    assert struct.unpack("<2f", constants[decay]) == pytest.approx((0.1, 0.0))
    assert struct.unpack("<f", constants[factor]) == (1.0,)
    made = {node.output[0]: list(node.input) for node in function.proto.node}
    last = function.proto.output[0].name
    assert made[last][1] == "io" and made[made[last][0]] == ["loss", update.output[0]]


def test_numbers_that_multiply_all_gradients_become_the_factor():
    function = Function(2, (0.1, 0.0))
    main = function.model.graph

    def apply(operator: str, inputs: list[str], output: str, *dims: int) -> str:
        function.model.primitives.add(name=f"M{output}", op_type=operator).prim_type = pb.PrimitiveProto.PRIMITIVE
        node = main.node.add(op_type=f"REF::M{output}", input=inputs, output=[output], name=output)
        shape = pb.TensorProto(dims=dims, data_type=pb.TensorProto.FLOAT)
        node.attribute.add(name="shape", type=pb.AttributeProto.TENSORS, tensors=[shape])
        return output

    scale, clip = (apply("ReLU", ["anything"], name, 1) for name in ("scale", "clip"))
    for i in range(2):
        unscaled = apply("Mul", [apply("ReLU", ["anything"], f"main_g{i}", 4), scale], f"main_u{i}", 4)
        apply("Mul", [unscaled, clip], f"main_c{i}", 4)
    given = {f"g{i}": f"main_c{i}" for i in range(2)}
    apply("Partial", ["update", *(given.get(entry.name, entry.name) for entry in function.proto.input)], "call", 1)
    (update,) = function.fused()
    names = [entry.name for entry in function.proto.input]
    (call,) = (node for node in main.node if node.name == "call")
    arguments = dict(zip(names, call.input[1:], strict=True))
    assert (arguments["g0"], arguments["g1"]) == ("main_g0", "main_g1")
    (factor,) = (node for node in main.node if node.output[0] == arguments[update.input[2]])
    assert sorted(factor.input) == ["clip", "scale"]
    assert names[-2:] == ["u", "io"] and list(call.input[-2:]) == ["u", "io"]


def test_gradients_that_the_function_makes_itself_have_no_factor():
    function = Function(1, (0.1,))
    function.apply("Cast", ["g0", "float"], "g0_cast")
    for node in function.proto.node:
        if node.output[0] != "g0_cast":
            node.input[:] = ["g0_cast" if name == "g0" else name for name in node.input]
    main = function.model.graph
    function.model.primitives.add(name="Mcall", op_type="Partial").prim_type = pb.PrimitiveProto.PRIMITIVE
    arguments = [entry.name for entry in function.proto.input]
    main.node.add(op_type="REF::Mcall", input=["update", *arguments], output=["call"], name="call")
    (update,) = function.fused()
    assert update.input[2] == "update:adamw/factor" and list(main.node[0].input[1:]) == arguments


def test_anything_more_stays_as_it_is():
    function = Function(1, (0.1,))
    function.apply("Assign", ["elsewhere", "g0", "u"], "extra")
    before = function.proto.SerializeToString()
    assert function.fused() == [] and function.proto.SerializeToString() == before


def test_another_rule_stays_as_it_is():
    function = Function(1, (0.1,))
    node = next(n for n in function.model.primitives if n.op_type == "Sqrt")
    node.op_type = "Square"
    assert function.fused() == []
