"""Reading a function of a lowered graph: what makes each value, constants, and patterns of operators."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir


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
    """The nodes of one function of a model.

    Args:
        primitives: of the model, by name.
        constants: of the model (mindir.constants): a function's may be written in another one.
        pass_on: operators whose first input is their value, so that patterns look through them.
    """

    def __init__(
        self,
        primitives: dict[str, pb.PrimitiveProto],
        constants: dict[str, pb.NodeProto],
        nodes: Iterable[pb.NodeProto],
        pass_on: tuple[str, ...] = (),
    ):
        self.primitives, self.constants, self.pass_on = primitives, constants, pass_on
        self.made_by = {node.output[0]: node for node in nodes}

    def primitive(self, node: pb.NodeProto) -> pb.PrimitiveProto | None:
        return self.primitives.get(mindir.reference(node))

    def operator(self, node: pb.NodeProto | None) -> str:
        primitive = self.primitive(node) if node is not None else None
        return primitive.op_type if primitive is not None else ""

    def maker(self, name: str) -> tuple[str, pb.NodeProto | None]:
        """Operator that makes value `name`, and its node."""
        node = self.made_by.get(name)
        return self.operator(node), node

    def origin(self, name: str) -> str:
        """What `name` is a copy of."""
        while self.maker(name)[0] in self.pass_on:
            name = self.made_by[name].input[0]
        return name

    def match(self, name: str, pattern: Is | str, found: dict[str, str] | None = None) -> dict[str, str]:
        """The values that stand where the pattern has names, with those in `found`, to which they are added.

        Raises NoMatch.
        """
        name, found = self.origin(name), {} if found is None else found
        if isinstance(pattern, str):
            if found.setdefault(pattern, name) != name:
                raise NoMatch(f"{pattern} is {found[pattern]} and {name}")
            return found
        operator, node = self.maker(name)
        if operator != pattern.operator or len(node.input) != len(pattern.inputs):
            raise NoMatch(f"{name} is no {pattern.operator}")
        for given, inner in zip(node.input, pattern.inputs, strict=True):
            self.match(given, inner, found)
        return found

    def match_one(self, name: str, patterns: Iterable[Is], **known: str) -> dict[str, str]:
        """What the first of the patterns that fits has found, with what is known. Raises NoMatch."""
        for pattern in patterns:
            with suppress(NoMatch):
                return self.match(name, pattern, dict(known))
        raise NoMatch(f"{name} is made by none of these patterns")

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
        found = self.match(name, op("Mul", "value", "number"))
        same = self.tensor(name).data_type == self.tensor(found["value"]).data_type
        if not same or self.dims(found["number"]) != [1]:
            raise NoMatch("not multiplied with a number (1,)")
        return found["value"], found["number"]

    def constant(self, name: str) -> Any:
        """Plain value of a constant. Raises NoMatch when it is computed."""
        if name not in self.constants:
            raise NoMatch(f"{name} is not a constant")
        return mindir.constant(self.constants[name])

    def number(self, name: str) -> float:
        """Value of a constant number, or of a tensor of one. Raises NoMatch."""
        value = self.constant(name)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(value, int | float):
            raise NoMatch(f"{name} is not a number")
        return value

    def integers(self, name: str) -> list[int]:
        """Value of a constant integer, or of a tuple or tensor of integers. Raises NoMatch."""
        value = self.constant(name)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) for item in values):
            raise NoMatch(f"{name} are no integers")
        return values

    def tensor(self, name: str) -> pb.TensorProto:
        """Shape and type of a value that a node makes. Raises NoMatch where they are not known."""
        node = self.made_by.get(name)
        shape = mindir.attribute(node, "shape") if node is not None else None
        if shape is None or len(shape.tensors) != 1:
            raise NoMatch(f"the shape of {name} is not known")
        return shape.tensors[0]

    def dims(self, name: str) -> list[int]:
        """Shape of a value that a node makes. Raises NoMatch where it is not known."""
        return list(self.tensor(name).dims)

    def is_float(self, name: str) -> bool:
        """True for float32 and bfloat16, which our kernels take."""
        return self.tensor(name).data_type in (pb.TensorProto.FLOAT, pb.TensorProto.BFLOAT16)
