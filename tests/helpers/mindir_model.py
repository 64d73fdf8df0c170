"""MindIR models made by hand, and what the lowering makes of them."""

import struct

from mindformers_ext.lowering.lower import lower
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import attributes_of, reference


class Model:
    """A MindIR model that grows node by node."""

    def __init__(self):
        self.proto = pb.ModelProto()
        self.proto.graph.output.add(name="out")

    def constant(self, name: str, value: float | int | tuple[int, ...] | None) -> str:
        node = self.proto.graph.node.add(op_type="Constant", output=[name], name=name)
        kinds = {int: ("i", pb.AttributeProto.INT64), bool: ("i", pb.AttributeProto.BOOL)}
        kinds |= {float: ("f", pb.AttributeProto.FLOAT)}
        field, kind = kinds.get(type(value), (None, pb.AttributeProto.NONE))
        stored = int(value) if field == "i" else value  # a bool too is a whole number
        attribute = node.attribute.add(name="value", type=kind, **({field: stored} if field else {}))
        if isinstance(value, tuple):
            attribute.type = pb.AttributeProto.TUPLE
            for item in value:
                attribute.values.add(type=pb.AttributeProto.INT64).ints.append(item)
        return name

    def tensor(self, name: str, value: float) -> str:
        """A constant float32 tensor ()."""
        node = self.proto.graph.node.add(op_type="Constant", output=[name], name=name)
        attribute = node.attribute.add(name="value", type=pb.AttributeProto.TENSORS)
        attribute.tensors.add(data_type=pb.TensorProto.FLOAT, raw_data=struct.pack("<f", value))
        return name

    def given(self, name: str, dtype: str, shape: tuple[int, ...]) -> str:
        """An input of the graph; dtype as MindIR names it, in any case."""
        tensor = self.proto.graph.input.add(name=name).tensor.add(dims=shape)
        tensor.data_type = pb.TensorProto.DataType.Value(dtype.upper())
        return name

    def apply(self, operator: str, inputs: list[str], output: str, *shapes: tuple[int, ...]) -> str:
        """Add a node; several shapes make a tuple."""
        self.proto.primitives.add(name=f"P{output}", op_type=operator, prim_type=pb.PrimitiveProto.PRIMITIVE)
        node = self.proto.graph.node.add(op_type=f"REF::P{output}", input=inputs, output=[output], name=output)
        tensors = [pb.TensorProto(dims=shape, data_type=pb.TensorProto.FLOAT) for shape in shapes]
        shape = node.attribute.add(name="shape")
        if len(tensors) == 1 and operator != "GroupedMatmul":
            shape.type = pb.AttributeProto.TENSORS
            shape.tensors.extend(tensors)
        else:
            shape.type = pb.AttributeProto.TUPLE
            for tensor in tensors:
                shape.values.add(type=pb.AttributeProto.TENSORS, tensors=[tensor])
        return output

    def lowered(self, output: str) -> tuple[str, list[str], dict]:
        """Kernel, inputs and attributes of the node that makes `output` after lowering."""
        lower(self.proto, 0, 1)
        node = next(node for node in self.proto.graph.node if node.output[0] == output)
        primitive = next(p for p in self.proto.primitives if p.name == reference(node))
        attributes = attributes_of(primitive)
        return attributes.get("func_name", "").split(":")[-1], list(node.input), attributes
