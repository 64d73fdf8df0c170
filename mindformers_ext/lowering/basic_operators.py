"""Basic operators of a rank's graph for which our kernels take the place of MindSpore's.

Extends lowering.py. MindSpore's CPU kernels of these refuse bfloat16 (MatMul) or take many times what the memory takes
(slices of columns and their gradients, masked rows). What a kernel of ours does not cover stays as it is.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from mindformers_ext.lowering.graph import Graph
from mindformers_ext.lowering.patterns import NoMatch
from mindformers_ext.rank_compiler import mind_ir as pb


def use_our_kernels(graph: Graph) -> None:
    """Replace the basic operators of the main graph where a kernel of ours does the same."""
    for node in graph.nodes:
        rewrite = BASIC_REWRITES.get(graph.operator(node))
        if rewrite is not None:
            with suppress(NoMatch):
                rewrite(graph, node)


def matmul(graph: Graph, node: pb.NodeProto) -> None:
    """MatMul(a, b, transpose_a, transpose_b)."""
    a, b, *turned = node.input
    if len(turned) != 2 or not graph.is_float(node.output[0]):
        raise NoMatch("the transposes are no inputs, or the numbers are integers")
    turned_a, turned_b = (graph.number(name) for name in turned)
    graph.kernel(node, "MatMul", [a, b], transpose_a=turned_a, transpose_b=turned_b)


def columns(graph: Graph, node: pb.NodeProto) -> None:
    """StridedSlice(x, begin, end, strides, five masks) that cuts the last axis only."""
    x, *limits = node.input
    first, last = _cut_columns(graph, graph.dims(x), limits)
    if graph.dims(node.output[0]) != [*graph.dims(x)[:-1], last - first] or not graph.is_float(x):
        raise NoMatch("another axis is cut, or integers")
    graph.kernel(node, "CutColumns", [x], first=first)


def joined_columns(graph: Graph, node: pb.NodeProto) -> None:
    """The sum of the gradients of two slices that cut one tensor's columns in two."""
    kind, pair = graph.maker(node.input[0])
    if kind != "MakeTuple" or len(pair.input) != 2 or not graph.is_float(node.output[0]):
        raise NoMatch("not two tensors")
    parts = {}
    for name in pair.input:
        kind, slice_grad = graph.maker(name)
        if kind != "StridedSliceGrad":
            raise NoMatch("not a slice's gradient")
        gradient, _, *limits = slice_grad.input
        parts[_cut_columns(graph, graph.dims(name), limits)] = gradient
    width, ends = graph.dims(node.output[0])[-1], sorted(parts)
    if len(ends) != 2 or ends[0][0] != 0 or ends[0][1] != ends[1][0] or ends[1][1] != width:
        raise NoMatch("not all columns, each once")
    graph.kernel(node, "JoinColumns", [parts[end] for end in ends])


def _cut_columns(graph: Graph, whole: list[int], limits: Sequence[str]) -> tuple[int, int]:
    """First column of a slice and the one after its last. Raises NoMatch when it cuts anything else of `whole`."""
    begin, end, strides = (graph.integers(name) for name in limits[:3])
    if any(graph.number(mask) for mask in limits[3:]) or any(step != 1 for step in strides):
        raise NoMatch("more than columns are cut")
    # The ends of axes that are not cut may be those of the whole cluster's tensor.
    others = list(zip(begin, end, whole, strict=True))[:-1]
    if any(first != 0 or last < size for first, last, size in others):
        raise NoMatch("another axis is cut")
    if begin[-1] < 0 or end[-1] > whole[-1]:
        raise NoMatch("counted from the end")
    return begin[-1], end[-1]


def masked_rows(graph: Graph, node: pb.NodeProto) -> None:
    """MaskedFill(x, mask, number) whose mask is the same for a whole row."""
    x, mask, number = node.input
    whole = graph.dims(node.output[0])
    graph.number(number)
    if graph.dims(mask) != [*whole[:-1], 1] or graph.dims(x) != whole or not graph.is_float(x):
        raise NoMatch("not rows")
    graph.kernel(node, "MaskedRows", [x, mask, number])


def row_sums(graph: Graph, node: pb.NodeProto) -> None:
    """ReduceSum(x, -1, ...) of bfloat16 that keeps the axis, which MindSpore's CPU kernel refuses."""
    x, axis = node.input[:2]
    if graph.tensor(x).data_type != pb.TensorProto.BFLOAT16 or graph.integers(axis) not in (
        [-1],
        [len(graph.dims(x)) - 1],
    ):
        raise NoMatch("not bfloat16, or another axis")
    if graph.dims(node.output[0]) != [*graph.dims(x)[:-1], 1]:
        raise NoMatch("the axis goes")
    graph.kernel(node, "RowSums", [x])


BASIC_REWRITES: dict[str, Callable[[Graph, pb.NodeProto], None]] = {
    "MatMul": matmul,
    "StridedSlice": columns,
    "AddN": joined_columns,
    "MaskedFill": masked_rows,
    "ReduceSum": row_sums,
}
