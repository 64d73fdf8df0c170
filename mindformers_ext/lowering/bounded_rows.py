"""Values whose length Ascend's graph learns at run time, on CPU: as long as they can ever be.

Extends lowering.py. MindSpore's CPU backend cannot infer the shapes of Custom operators that vary. Operators that
choose rows mark those behind the real ones (index -1); what is taken with such an index is NaN, or -1, and what is
added with one goes nowhere (cpu_kernels/exact_rows.cc).
"""

from collections.abc import Iterator
from math import prod

from mindformers_ext.layers.exact_experts import AT_MOST
from mindformers_ext.lowering.graph import Graph
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import attribute, attributes_of

MOVES = ("MoeTokenPermute", "MoeTokenPermuteGrad")


def bound_rows(graph: Graph) -> None:
    """Write into every shape that varies the most it can be. Raises ValueError where nothing tells it."""
    if not any(_open(node) for node in graph.nodes):
        return
    graph.sort()
    most: dict[str, int] = {}  # what the varying axis of a value becomes
    for node in graph.nodes:
        if graph.operator(node) in MOVES:  # MindSpore forgets how wide the rows are
            for dims in _open(node):
                dims[-1] = graph.dims(node.input[0])[-1] if len(dims) == 2 else dims[-1]
        shapes = _open(node)
        if shapes:
            most[node.output[0]] = size = _most(graph, node, most)
            for dims in shapes:
                dims[:] = [size if axis < 0 else axis for axis in dims]


def _open(node: pb.NodeProto) -> list:
    """The shapes of a node's results that vary."""
    return [dims for dims in _shapes(attribute(node, "shape")) if any(axis < 0 for axis in dims)]


def _most(graph: Graph, node: pb.NodeProto, most: dict[str, int]) -> int:
    """What the axis that varies can be at most."""
    if graph.operator(node) == "Reshape":  # as many elements as the input has
        return prod(graph.dims(node.input[0])) // -prod(graph.dims(node.output[0]))
    primitive = graph.primitive(node)
    part = attributes_of(primitive).get(AT_MOST) if primitive is not None else None
    if part:
        return prod(graph.dims(node.input[0])) * part[0] // part[1]
    given = [most[name] for name in node.input if name in most]
    if not given:
        raise ValueError(f"node '{node.name}' has no static shape, and nothing says how large it can be")
    return max(given)


def _shapes(shape: pb.AttributeProto | None) -> Iterator:
    """The dims of every tensor of a value, nested tuples included."""
    if shape is not None:
        yield from (tensor.dims for tensor in shape.tensors)
        for value in shape.values:
            yield from _shapes(value)


def take_rows(graph: Graph, node: pb.NodeProto) -> None:
    """IndexSelect(x, axis 0, index)."""
    x, axis, index = node.input
    if graph.constant(axis) != 0:
        raise ValueError(f"'{node.name}' takes columns of a table, which CPU does not know")
    graph.kernel(node, "TakeRows", [x, index])


def add_rows(graph: Graph, node: pb.NodeProto) -> None:
    """IndexAddExt(x, 0, index, rows, 1)."""
    x, _, index, rows, _ = node.input
    graph.kernel(node, "AddRows", [x, index, rows])


def places(graph: Graph, node: pb.NodeProto) -> None:
    """NonZero(x)."""
    graph.kernel(node, "NonZeroPlaces", node.input[:1])
