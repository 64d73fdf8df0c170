"""Finding groups of operators in a lowered graph: nodes, constants, and patterns of operators that end in a value."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import mindspore.train.mind_ir_pb2 as pb


class NoMatch(Exception):
    """A node is not what the pattern has in its place."""


@dataclass(frozen=True)
class Is:
    """Pattern: operator and the patterns of its inputs; a string is a value to remember under that name."""

    operator: str
    inputs: tuple


def op(operator: str, *inputs) -> Is:
    return Is(operator, inputs)


class Nodes:
    """The nodes of one function of a model, by the value that they make.

    Args:
        pass_on: operators whose first input is their value, so that patterns look through them.
    """

    def __init__(self, graph, nodes: Iterable[pb.NodeProto], pass_on: tuple[str, ...] = ()):
        self.graph, self.pass_on = graph, pass_on
        self.nodes = {node.output[0]: node for node in nodes}
        self.constants = {
            node.output[0]: node
            for part in (graph.model.graph, *graph.model.functions)
            for node in part.node
            if node.op_type == "Constant"
        }

    def operator(self, node: pb.NodeProto | None) -> str:
        primitive = self.graph.primitive(node) if node is not None else None
        return primitive.op_type if primitive is not None else ""

    def origin(self, name: str) -> str:
        """What `name` is a copy of."""
        while self.operator(self.nodes.get(name)) in self.pass_on:
            name = self.nodes[name].input[0]
        return name

    def match(self, name: str, pattern: Is | str, found: dict[str, str]) -> None:
        """Fill `found` with the values that stand where the pattern has names. Raises NoMatch."""
        name = self.origin(name)
        if isinstance(pattern, str):
            if found.setdefault(pattern, name) != name:
                raise NoMatch(f"{pattern} is {found[pattern]} and {name}")
            return
        node = self.nodes.get(name)
        if self.operator(node) != pattern.operator or len(node.input) != len(pattern.inputs):
            raise NoMatch(f"{name} is no {pattern.operator}")
        for given, inner in zip(node.input, pattern.inputs, strict=True):
            self.match(given, inner, found)

    def unscaled(self, names: list[str]) -> tuple[list[str], list[str]]:
        """The values without the computed numbers that all of them are multiplied with, and these numbers."""
        numbers: list[str] = []
        try:
            while names:
                pairs = [self._product(name) for name in names]
                if len({number for _, number in pairs}) > 1:
                    break
                names = [value for value, _ in pairs]
                numbers.append(pairs[0][1])
        except NoMatch:
            pass
        return names, numbers

    def _product(self, name: str) -> tuple[str, str]:
        """The value and the number whose product `name` is. Raises NoMatch."""
        found: dict[str, str] = {}
        self.match(name, op("Mul", "value", "number"), found)
        same = self._tensor(name).data_type == self._tensor(found["value"]).data_type
        if not same or self.dims(found["number"]) != [1]:
            raise NoMatch("not multiplied with a number (1,)")
        return found["value"], found["number"]

    def number(self, name: str) -> float:
        """Value of a constant number: a float32 tensor of one element, or an integer. Raises NoMatch."""
        value = self._constant(name)
        if value.type in (pb.AttributeProto.INT64, pb.AttributeProto.INT32, pb.AttributeProto.BOOL):
            return float(value.i)
        if len(value.tensors) != 1 or len(value.tensors[0].raw_data) != 4:
            raise NoMatch(f"{name} is not a number")
        return struct.unpack("<f", value.tensors[0].raw_data)[0]

    def integers(self, name: str) -> list[int]:
        """Value of a constant integer or tuple of integers. Raises NoMatch."""
        value = self._constant(name)
        if value.type in (pb.AttributeProto.INT64, pb.AttributeProto.INT32):
            return [value.i]
        if value.type not in (pb.AttributeProto.TUPLE, pb.AttributeProto.LIST):
            raise NoMatch(f"{name} are no integers")
        return [item.ints[0] if item.ints else item.i for item in value.values]

    def dims(self, name: str) -> list[int]:
        """Shape of a value that a node makes. Raises NoMatch where it is not known."""
        return list(self._tensor(name).dims)

    def is_float(self, name: str) -> bool:
        """True for float32 and bfloat16, which our kernels take."""
        return self._tensor(name).data_type in (pb.TensorProto.FLOAT, pb.TensorProto.BFLOAT16)

    def _tensor(self, name: str) -> pb.TensorProto:
        node = self.nodes.get(name)
        for attribute in node.attribute if node is not None else ():
            if attribute.name == "shape" and len(attribute.tensors) == 1:
                return attribute.tensors[0]
        raise NoMatch(f"the shape of {name} is not known")

    def _constant(self, name: str) -> pb.AttributeProto:
        values = [a for a in self.constants[name].attribute if a.name == "value"] if name in self.constants else []
        if not values:
            raise NoMatch(f"{name} is not a constant")
        return values[0]


def product(graph, output: str, numbers: list[str]) -> str:
    """Let the main graph multiply computed float32 numbers (1,); returns the product, `output` if there are several."""
    value = numbers[0]
    for i, number in enumerate(numbers[1:], 1):
        name = output if i == len(numbers) - 1 else f"{output}/{i}"
        node = graph.model.graph.node.add(name=name, input=[value, number], output=[name])
        shape = pb.TensorProto(dims=[1], data_type=pb.TensorProto.FLOAT)
        node.attribute.add(name="shape", type=pb.AttributeProto.TENSORS, tensors=[shape])
        graph.use(node, "Mul")
        value = name
    return value


def constant(name: str, numbers: list[float]) -> pb.NodeProto:
    """A node that makes a float32 tensor (n,) of these numbers."""
    node = pb.NodeProto(name=name, output=[name], op_type="Constant")
    value = node.attribute.add(name="value", type=pb.AttributeProto.TENSORS)
    value.tensors.add(
        name="value0",
        dims=[len(numbers)],
        data_type=pb.TensorProto.FLOAT,
        raw_data=struct.pack(f"<{len(numbers)}f", *numbers),
    )
    return node
