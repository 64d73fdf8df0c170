"""Inline the functions of a MindIR model into its main graph.

`lazy_inline` leaves each repeated cell as one function that every layer and micro-batch calls, and its backward pass
as a closure that the forward call returns. The collectives of a rank have one fixed order only in one flat graph, so
the calls are followed symbolically (closures and tuples of them are known while inlining) and copied out. A function
that is chosen at run time (the optimizer behind `if not overflow`) stays a function.
"""

from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import Bundle, Closure, constant, constants, reference


def inline_functions(model: pb.ModelProto) -> None:
    """Flatten `model` in place; only functions behind a Switch are left."""
    if not model.functions:
        return
    inliner = _Inliner(model)
    nodes = [pb.NodeProto.FromString(node.SerializeToString()) for node in inliner.run()]
    # In their old order: a constant is written once, in the first function that uses it.
    kept = [function for function in model.functions if function.name in inliner.kept]
    kept = [pb.GraphProto.FromString(function.SerializeToString()) for function in kept]
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    model.functions.extend(kept)


class _Inliner:
    def __init__(self, model: pb.ModelProto):
        self.model = model
        self.functions = {function.name: function for function in model.functions}
        self.operators = {primitive.name: primitive.op_type for primitive in model.primitives}
        self.constants = constants(model)
        self.out: list[pb.NodeProto] = []
        self.kept: set[str] = set()  # functions that stay
        self.calls = 0
        self.added = 0

    def run(self) -> list[pb.NodeProto]:
        result = self._emit(self.model.graph, {}, "")
        if result != self.model.graph.output[0].name:
            self.model.graph.output[0].name = self._tensor(result)
        kept = [node for name in self.kept for node in self.functions[name].node]
        used = {name for node in kept for name in node.input}
        used -= {node.output[0] for node in kept if node.op_type == "Constant"}
        used |= {name for node in self.out for name in node.input}
        return [node for name, node in self.constants.items() if name in used] + self.out

    def _emit(self, graph: pb.GraphProto, values: dict, prefix: str):
        """Copy the nodes of one call of `graph`; returns the value of its output."""
        for node in graph.node:
            if node.op_type != "Constant":
                values[node.output[0]] = self._node(node, values, prefix)
        return self._value(graph.output[0].name, values)

    def _value(self, name: str, values: dict):
        if name in values:
            return values[name]
        return Closure(name) if name in self.functions else name

    def _node(self, node: pb.NodeProto, values: dict, prefix: str):
        inputs = tuple(self._value(name, values) for name in node.input)
        applied = reference(node)
        operator = self.operators.get(applied)
        called = None if operator or not applied else self._value(applied, values)
        if isinstance(called, Closure):
            return self._call(called, inputs)
        symbolic = any(not isinstance(value, str) for value in inputs)
        if operator == "Partial":
            return Closure(inputs[0].function, inputs[0].bound + inputs[1:])
        if operator == "MakeTuple" and symbolic:
            return Bundle(inputs)
        if operator == "TupleGetItem" and isinstance(inputs[0], Bundle):
            return inputs[0].elements[constant(self.constants[node.input[1]])]
        if operator == "Depend" and not isinstance(inputs[0], str):
            return inputs[0]  # a closure computes nothing itself; what it waits for is ordered by its own inputs
        if operator == "Switch":
            inputs = tuple(self._function_value(i) if isinstance(i, Closure) else i for i in inputs)
        copy = pb.NodeProto()
        copy.CopyFrom(node)
        if called is not None:
            copy.op_type = f"REF::{called}"
        copy.name = copy.output[0] = prefix + node.output[0]
        del copy.input[:]
        copy.input.extend([self._tensor(value) for value in inputs])
        self.out.append(copy)
        return copy.output[0]

    def _call(self, closure: Closure, arguments: tuple):
        function = self.functions[closure.function]
        arguments = closure.bound + arguments
        if len(function.input) != len(arguments):
            raise ValueError(
                f"'{function.name}' takes {len(function.input)} arguments, it is called with {len(arguments)}"
            )
        self.calls += 1
        values = {parameter.name: value for parameter, value in zip(function.input, arguments, strict=True)}
        return self._emit(function, values, f"call{self.calls}/")

    def _function_value(self, closure: Closure) -> str:
        """A node that holds `closure` at run time."""
        self._keep(closure.function)
        return self._add("Partial", [closure.function, *(self._tensor(value) for value in closure.bound)])

    def _keep(self, name: str) -> None:
        """Keep function `name` and all that it refers to."""
        if name in self.kept:
            return
        self.kept.add(name)
        for node in self.functions[name].node:
            for used in [reference(node), *node.input]:
                if used in self.functions:
                    self._keep(used)

    def _tensor(self, value) -> str:
        """The name of a plain value; a closure or bundle becomes a tuple of its tensors, which only orders nodes."""
        if isinstance(value, str):
            return value
        leaves = list(dict.fromkeys(self._leaves(value)))
        return leaves[0] if len(leaves) == 1 else self._add("MakeTuple", leaves)

    def _leaves(self, value):
        if isinstance(value, str):
            yield value
        else:
            for element in value.elements if isinstance(value, Bundle) else value.bound:
                yield from self._leaves(element)

    def _add(self, operator: str, inputs: list[str]) -> str:
        """Append a node; returns its output."""
        primitive = f"{operator}:inlined"
        if primitive not in self.operators:
            self.model.primitives.add(name=primitive, op_type=operator, prim_type=pb.PrimitiveProto.PRIMITIVE)
            self.operators[primitive] = operator
        self.added += 1
        name = f"{operator}:inlined{self.added}"
        self.out.append(pb.NodeProto(name=name, input=inputs, output=[name], op_type=f"REF::{primitive}"))
        return name
