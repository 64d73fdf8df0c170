"""A flat MindIR model while it is being lowered, and how nodes are added to it and changed."""

import struct
from collections.abc import Iterable, Sequence

from mindformers_ext.cpu_kernels.library import library_path
from mindformers_ext.lowering.merging import Placed
from mindformers_ext.lowering.patterns import Nodes
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir


class Graph(Nodes):
    """The main graph of a model, read as `Nodes` and changed; one for all parts of the lowering."""

    def __init__(self, model: pb.ModelProto, rank: int, world_size: int):
        primitives = {primitive.name: primitive for primitive in model.primitives}
        super().__init__(primitives, mindir.constants(model), model.graph.node)
        self.model, self.rank, self.world_size = model, rank, world_size
        self.collectives: list[Placed] = []

    @property
    def nodes(self):
        """The main graph's, in their order."""
        return self.model.graph.node

    def add(self, node: pb.NodeProto) -> pb.NodeProto:
        """Append a node; returns the graph's copy. `sort` puts it where it belongs."""
        self.nodes.append(node)
        self.made_by[node.output[0]] = self.nodes[-1]
        return self.nodes[-1]

    def rename(self, node: pb.NodeProto, output: str) -> None:
        """Let the node make a value of another name; another node must make the old one."""
        node.output[0] = output
        self.made_by[output] = node

    def untuple(self, node: pb.NodeProto) -> None:
        """Let `node`, which makes a tuple of one tensor, make the tensor, and another node the tuple."""
        name = node.output[0]
        shape = mindir.attribute(node, "shape")
        element = pb.AttributeProto(name="shape", type=pb.AttributeProto.TENSORS, tensors=shape.values[0].tensors)
        shape.CopyFrom(element)
        self.rename(node, f"{name}/element")
        self.use(self.add(made(f"{node.name}/tuple", [node.output[0]], name)), "MakeTuple")

    def integer(self, value: int) -> str:
        """A constant number of the main graph."""
        name = f"integer:lowered{value}"
        if name not in self.made_by:
            node = self.add(pb.NodeProto(name=name, output=[name], op_type="Constant"))
            node.attribute.add(name="value", i=value, type=pb.AttributeProto.INT64)
        return name

    def product(self, output: str, numbers: list[str]) -> str:
        """Multiply computed float32 numbers (1,); returns the product, `output` if there are several."""
        value = numbers[0]
        for i, number in enumerate(numbers[1:], 1):
            name = output if i == len(numbers) - 1 else f"{output}/{i}"
            self.use(self.add(number_made(name, [value, number])), "Mul")
            value = name
        return value

    def use(self, node: pb.NodeProto, operator: str, **attributes) -> None:
        """Make `node` apply a new primitive."""
        name = f"{operator}:lowered{len(self.primitives)}"
        primitive = self.model.primitives.add(name=name, op_type=operator, instance_name="op")
        primitive.prim_type = pb.PrimitiveProto.PRIMITIVE
        for key, value in attributes.items():
            set_attribute(primitive, key, value)
        self.primitives[name] = primitive
        node.op_type = f"REF::{name}"

    def custom(self, node: pb.NodeProto, function: str, **attributes) -> None:
        """Make `node` the Custom operator `function` of a library of ours (PATH:NAME)."""
        several = len(mindir.attribute(node, "shape").values) > 1
        common = dict(imply_path="", func_type="aot", func_name=function, uniq_name=f"Custom_{function}")
        self.use(node, "Custom", **common, multi_output=several, autodiff=False, **attributes)

    def kernel(self, node: pb.NodeProto, kernel: str, inputs: Sequence[str], **attributes: float) -> None:
        """Make `node` apply a kernel of cpu_kernels to `inputs`."""
        numbers = {name: repr(float(value)) for name, value in attributes.items()}
        self.custom(node, f"{library_path()}:{kernel}", **numbers)
        node.input[:] = inputs

    def sort(self) -> None:
        """Put every node behind those that it takes its inputs from, else as they were."""
        done: dict[str, int] = {}
        for node in self.nodes:
            stack = [node.output[0]]
            while stack:
                name = stack[-1]
                missing = [given for given in self._sources(name) if given not in done]
                if missing and name not in done:
                    stack.extend(reversed(missing))
                else:
                    done.setdefault(name, len(done))
                    stack.pop()
        self.nodes.sort(key=lambda node: done[node.output[0]])

    def _sources(self, name: str) -> Iterable[str]:
        """Every node that one needs: its inputs, and the value that it calls."""
        node = self.made_by[name]
        return (given for given in (*node.input, mindir.reference(node)) if given in self.made_by)


def made(name: str, inputs: Sequence[str], output: str = "") -> pb.NodeProto:
    """A node that makes a value, which has the node's name unless told."""
    return pb.NodeProto(name=name, input=inputs, output=[output or name])


def number_made(name: str, inputs: Sequence[str]) -> pb.NodeProto:
    """A node that makes a float32 number (1,)."""
    node = made(name, inputs)
    shape = pb.TensorProto(dims=[1], data_type=pb.TensorProto.FLOAT)
    node.attribute.add(name="shape", type=pb.AttributeProto.TENSORS, tensors=[shape])
    return node


def constant(name: str, numbers: list[float]) -> pb.NodeProto:
    """A node that makes a float32 tensor (n,) of these numbers."""
    node = pb.NodeProto(name=name, output=[name], op_type="Constant")
    value = node.attribute.add(name="value", type=pb.AttributeProto.TENSORS)
    raw = struct.pack(f"<{len(numbers)}f", *numbers)
    value.tensors.add(name="value0", dims=[len(numbers)], data_type=pb.TensorProto.FLOAT, raw_data=raw)
    return node


def set_attribute(primitive: pb.PrimitiveProto, name: str, value) -> None:
    """Add an attribute: bool, int, str, or a sequence of integers."""
    attribute = primitive.attribute.add(name=name)
    if isinstance(value, bool):
        attribute.i, attribute.type = int(value), pb.AttributeProto.BOOL
    elif isinstance(value, int):
        attribute.i, attribute.type = value, pb.AttributeProto.INT64
    elif isinstance(value, str):
        attribute.s, attribute.type = value.encode(), pb.AttributeProto.STRING
    else:
        attribute.type = pb.AttributeProto.TUPLE
        for item in value:
            attribute.values.add(type=pb.AttributeProto.INT64).ints.append(item)
