"""Basic operators of a rank's graph for which our kernels take the place of MindSpore's.

Extends lowering.py. MindSpore's CPU kernels of these refuse bfloat16 (MatMul) or take many times what the memory takes
(slices of columns and their gradients, masked rows). What a kernel of ours does not cover stays as it is.
"""

from collections.abc import Callable, Sequence

from mindformers_ext.lowering.fused_operators import Operator, replace
from mindformers_ext.lowering.patterns import Nodes, NoMatch


def use_our_kernels(graph) -> None:
    """Replace the basic operators of the main graph where a kernel of ours does the same."""
    nodes = Nodes(graph, graph.model.graph.node)
    for node in graph.model.graph.node:
        rewrite = BASIC_REWRITES.get(nodes.operator(node))
        if rewrite is None:
            continue
        try:
            rewrite(nodes, Operator(graph, node))
        except NoMatch:
            continue


def matmul(nodes: Nodes, operator: Operator) -> None:
    """MatMul(a, b, transpose_a, transpose_b)."""
    a, b, *turned = operator.node.input
    if len(turned) != 2 or not nodes.is_float(operator.node.output[0]):
        raise NoMatch("the transposes are no inputs, or the numbers are integers")
    turned_a, turned_b = (operator.constant(i) for i in (2, 3))
    replace(operator, "MatMul", [a, b], transpose_a=turned_a, transpose_b=turned_b)


def columns(nodes: Nodes, operator: Operator) -> None:
    """StridedSlice(x, begin, end, strides, five masks) that cuts the last axis only."""
    x, *limits = operator.node.input
    first, last = _cut_columns(nodes, nodes.dims(x), limits)
    if nodes.dims(operator.node.output[0]) != [*nodes.dims(x)[:-1], last - first] or not nodes.is_float(x):
        raise NoMatch("another axis is cut, or integers")
    replace(operator, "CutColumns", [x], first=first)


def joined_columns(nodes: Nodes, operator: Operator) -> None:
    """The sum of the gradients of two slices that cut one tensor's columns in two."""
    kind, pair = operator.made_by(operator.node.input[0])
    if kind != "MakeTuple" or len(pair.input) != 2 or not nodes.is_float(operator.node.output[0]):
        raise NoMatch("not two tensors")
    parts = {}
    for name in pair.input:
        kind, node = operator.made_by(name)
        if kind != "StridedSliceGrad":
            raise NoMatch("not a slice's gradient")
        gradient, _, *limits = node.input
        parts[_cut_columns(nodes, nodes.dims(name), limits)] = gradient
    width, ends = nodes.dims(operator.node.output[0])[-1], sorted(parts)
    if len(ends) != 2 or ends[0][0] != 0 or ends[0][1] != ends[1][0] or ends[1][1] != width:
        raise NoMatch("not all columns, each once")
    replace(operator, "JoinColumns", [parts[end] for end in ends])


def _cut_columns(nodes: Nodes, whole: list[int], limits: Sequence[str]) -> tuple[int, int]:
    """First column of a slice and the one after its last. Raises NoMatch when it cuts anything else of `whole`."""
    begin, end, strides = (nodes.integers(name) for name in limits[:3])
    if any(nodes.number(mask) for mask in limits[3:]) or any(step != 1 for step in strides):
        raise NoMatch("more than columns are cut")
    # The ends of axes that are not cut may be those of the whole cluster's tensor.
    others = list(zip(begin, end, whole, strict=True))[:-1]
    if any(first != 0 or last < size for first, last, size in others):
        raise NoMatch("another axis is cut")
    if begin[-1] < 0 or end[-1] > whole[-1]:
        raise NoMatch("counted from the end")
    return begin[-1], end[-1]


def masked_rows(nodes: Nodes, operator: Operator) -> None:
    """MaskedFill(x, mask, number) whose mask is the same for a whole row."""
    x, mask, number = operator.node.input
    whole = nodes.dims(operator.node.output[0])
    nodes.number(number)
    if nodes.dims(mask) != [*whole[:-1], 1] or nodes.dims(x) != whole or not nodes.is_float(x):
        raise NoMatch("not rows")
    replace(operator, "MaskedRows", [x, mask, number])


BASIC_REWRITES: dict[str, Callable[[Nodes, Operator], None]] = {
    "MatMul": matmul,
    "StridedSlice": columns,
    "AddN": joined_columns,
    "MaskedFill": masked_rows,
}
