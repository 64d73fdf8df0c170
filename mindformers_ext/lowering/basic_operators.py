"""Basic operators of a rank's graph for which our kernels take the place of MindSpore's.

Extends lowering.py. MindSpore's CPU kernels of these refuse bfloat16 (MatMul) or take many times what the memory takes
(columns cut and joined, masked rows). What a kernel of ours does not cover stays as it is.
"""

from collections.abc import Callable
from contextlib import suppress

from mindformers_ext.lowering.graph import Graph
from mindformers_ext.lowering.patterns import NoMatch
from mindformers_ext.rank_compiler import mind_ir as pb

ADD = 1  # TensorScatterElements' number of this reduction


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


def split_columns(graph: Graph, node: pb.NodeProto) -> None:
    """SplitWithSize(x, sizes, axis) of the last axis in two."""
    x, sizes, axis = node.input
    if len(graph.integers(sizes)) != 2:
        raise NoMatch("not two parts")
    _check_columns(graph, x, axis)
    graph.kernel(node, "SplitColumns", [x])


def join_columns(graph: Graph, node: pb.NodeProto) -> None:
    """Concat(two tensors, axis) along the last axis."""
    kind, pair = graph.maker(node.input[0])
    if kind != "MakeTuple" or len(pair.input) != 2:
        raise NoMatch("not two tensors")
    _check_columns(graph, node.output[0], node.input[1])
    graph.kernel(node, "JoinColumns", list(pair.input))


def _check_columns(graph: Graph, whole: str, axis: str) -> None:
    """Raises NoMatch where `axis` is not the last one of `whole`, or the numbers are integers."""
    if graph.integers(axis)[0] not in (-1, len(graph.dims(whole)) - 1) or not graph.is_float(whole):
        raise NoMatch("another axis, or integers")


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


def add_at(graph: Graph, node: pb.NodeProto) -> None:
    """ScatterAddExt(x, axis, places, values), which MindSpore has no CPU kernel of."""
    x, axis, places, values = node.input
    reduce = pb.NodeProto(name=f"{node.name}/reduce", output=[f"{node.name}/reduce"], op_type="Constant")
    reduce.attribute.add(name="value", type=pb.AttributeProto.INT64, i=ADD)
    graph.add(reduce)
    graph.use(node, "TensorScatterElements")
    node.input[:] = [x, places, values, axis, reduce.output[0]]


BASIC_REWRITES: dict[str, Callable[[Graph, pb.NodeProto], None]] = {
    "MatMul": matmul,
    "SplitWithSize": split_columns,
    "Concat": join_columns,
    "MaskedFill": masked_rows,
    "ReduceSum": row_sums,
    "ScatterAddExt": add_at,
}
