"""Ascend's fused operators in a rank's graph, and the CPU kernel that each becomes.

Extends lowering.py with the operators of `cpu_kernels`, so that a graph compiled with use_flash_attention, use_gmm,
use_fused_ops_permute ... runs on CPU as it was compiled.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mindformers_ext.layers.fused_ops import HALVES, INTERLEAVED
from mindformers_ext.lowering.graph import Graph
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir
from mindformers_ext.rank_compiler.operators import LAYOUTS

CAUSAL, CAUSAL_TO_LAST, BAND, BY_MASK = 2, 3, 4, 0  # sparse_mode of FlashAttentionScore
TOKENS = next(number for number, name in LAYOUTS.items() if name == "TND")


@dataclass(frozen=True)
class Same:
    """A kernel that takes some of the Ascend operator's inputs, in this order, and writes the same outputs."""

    kernel: str
    inputs: tuple[int, ...]
    attributes: Callable[[Graph, pb.NodeProto], dict[str, float]] = lambda graph, node: {}

    def __call__(self, graph: Graph, node: pb.NodeProto) -> None:
        graph.kernel(node, self.kernel, [node.input[i] for i in self.inputs], **self.attributes(graph, node))


def attention_attributes(graph: Graph, node: pb.NodeProto, scale: int) -> dict[str, float]:
    """Scale and diagonal from the constants that begin with the scale (FlashAttentionScore's order)."""
    value, before, after, _, _, mode = (graph.constant(name) for name in node.input[scale : scale + 6])
    query, key = (graph.dims(name) for name in node.input[:2])
    to_last = key[2] - query[2]
    if mode == BAND and before < query[2] + abs(to_last):
        raise ValueError(f"'{node.name}' attends to a band of {before} earlier keys, which CPU does not know")
    diagonals = {CAUSAL: 0, CAUSAL_TO_LAST: to_last, BAND: to_last + after, BY_MASK: 0}
    if mode not in diagonals:
        raise ValueError(f"'{node.name}' has sparse_mode {mode}; CPU knows {sorted(diagonals)}")
    return {"scale": value, "diagonal": diagonals[mode]}


def flash_attention(graph: Graph, node: pb.NodeProto) -> None:
    """FlashAttentionScore(query, key, value, ..., attn_mask at 6, ..., scale at 12, ..., sparse_mode at 17)."""
    if graph.constant(node.input[16]) == TOKENS:
        return packed_attention(graph, node, "PackedAttention", (0, 1, 2), 8, 12)
    attributes = attention_attributes(graph, node, 12)
    mask = [node.input[6]] if graph.constant(node.input[17]) == BY_MASK else []
    graph.kernel(node, "FlashAttentionScore", [*node.input[:3], *mask], **attributes)


def flash_attention_grad(graph: Graph, node: pb.NodeProto) -> None:
    """FlashAttentionScoreGrad(query, key, value, dy, ..., attn_mask at 7, .., softmax_sum at 9, .., context at 11)."""
    if graph.constant(node.input[21]) == TOKENS:
        del mindir.attribute(node, "shape").values[3:]
        return packed_attention(graph, node, "PackedAttentionGrad", (3, 0, 1, 2, 11, 9), 13, 17)
    attributes = attention_attributes(graph, node, 17)
    order = (3, 0, 1, 2, 11, 9, 7) if graph.constant(node.input[22]) == BY_MASK else (3, 0, 1, 2, 11, 9)
    del mindir.attribute(node, "shape").values[3:]  # the gradient of the position bias, which is empty
    graph.kernel(node, "FlashAttentionGrad", [node.input[i] for i in order], **attributes)


def packed_attention(
    graph: Graph, node: pb.NodeProto, kernel: str, inputs: tuple[int, ...], ends: int, scale: int
) -> None:
    """Layout TND, with the ends of documents in queries at `ends` and in keys behind it: tuples made of tensors."""
    value, mode = graph.constant(node.input[scale]), graph.constant(node.input[scale + 5])
    if mode not in (CAUSAL, CAUSAL_TO_LAST):
        raise ValueError(f"'{node.name}' has sparse_mode {mode} in layout TND; CPU knows {CAUSAL} and {CAUSAL_TO_LAST}")
    tensors = [node.input[i] for i in inputs]
    for name in node.input[ends : ends + 2]:
        kind, made = graph.maker(_whole_tuple(graph, name))
        if kind != "TensorToTuple":
            raise ValueError(f"'{node.name}' has ends of documents made by {kind}; CPU takes those that are a tensor")
        tensors.append(made.input[0])
    graph.kernel(node, kernel, tensors, scale=value, to_last=mode == CAUSAL_TO_LAST)


def _whole_tuple(graph: Graph, name: str) -> str:
    """The tuple that `name` is made of again, item by item: so a tuple comes out of a function's arguments."""
    kind, made = graph.maker(name)
    if kind != "MakeTuple" or not made.input:
        return name
    items = [graph.maker(graph.origin(item)) for item in made.input]
    if any(kind != "TupleGetItem" for kind, _ in items):
        return name
    sources = {item.input[0] for _, item in items}
    in_order = [graph.constant(item.input[1]) for _, item in items] == list(range(len(items)))
    return sources.pop() if len(sources) == 1 and in_order else name


def grouped_matmul(graph: Graph, node: pb.NodeProto) -> None:
    """GroupedMatmul([x], [weight], ..., group_list at 7, ..., group_type at 9): a tuple of one result.

    MindSpore writes the gradients as products with transposes; the kernels take what was transposed.
    """
    x, weight = (_only_element(graph, node, index) for index in (0, 1))
    of_x, of_weight = (_untransposed(graph, name) for name in (x, weight))
    if graph.constant(node.input[9]) == 2:
        kernel, inputs = "GroupedMatmulWeightGrad", [of_x, weight]
    elif of_weight is not None:
        kernel, inputs = "GroupedMatmulInputGrad", [x, of_weight]
    else:
        kernel, inputs = "GroupedMatmul", [x, weight]
    if None in inputs:
        raise ValueError(f"'{node.name}' sums over groups of rows, but its first input is not a transpose")
    graph.untuple(node)
    graph.kernel(node, kernel, [*inputs, node.input[7]])


def _only_element(graph: Graph, node: pb.NodeProto, index: int) -> str:
    """The only tensor of a tuple input."""
    kind, pack = graph.maker(node.input[index])
    if kind != "MakeTuple" or len(pack.input) != 1:
        raise ValueError(f"input {index} of '{node.name}' is not a tuple of one tensor")
    return pack.input[0]


def _untransposed(graph: Graph, name: str) -> str | None:
    """What `name` is the transpose of (of its last two axes); None when it is no transpose."""
    kind, node = graph.maker(name)
    return node.input[0] if kind == "TransposeExtView" else None


def turning(graph: Graph, node: pb.NodeProto, direction: int, mode: int) -> dict[str, float]:
    """Attributes of the rotary kernel; input `mode` of Ascend's operator says which values make a pair."""
    pairs = graph.constant(node.input[mode])
    if pairs not in (HALVES, INTERLEAVED):
        raise ValueError(f"'{node.name}' has mode {pairs}; CPU knows {HALVES} (half) and {INTERLEAVED} (interleaved)")
    return {"direction": direction, "halves": pairs == HALVES}


def largest(graph: Graph, node: pb.NodeProto) -> None:
    """TopkExt(x, k, dim, largest, sorted): CPU has TopK, which gives places as int32."""
    dim, *rest = (graph.constant(name) for name in node.input[2:5])
    if dim not in (-1, len(graph.dims(node.input[0])) - 1) or not all(rest):
        raise ValueError(f"'{node.name}' does not choose the largest of the last axis, sorted: CPU knows only that")
    del node.input[2:]
    mindir.attribute(node, "shape").values[1].tensors[0].data_type = pb.TensorProto.INT32
    graph.use(node, "TopK", sorted=True)


FUSED_REWRITES: dict[str, Callable] = {
    "RmsNorm": Same("RmsNorm", (0, 1), lambda graph, node: {"eps": graph.constant(node.input[2])}),
    "RmsNormGrad": Same("RmsNormGrad", (0, 1, 2, 3)),
    "RotaryPositionEmbedding": Same("Rotary", (0, 1, 2), lambda graph, node: turning(graph, node, 1, 3)),
    "RotaryPositionEmbeddingGrad": Same("Rotary", (0, 1, 2), lambda graph, node: turning(graph, node, -1, 4)),
    "Swiglu": Same("SwiGluHalves", (0,)),
    "SwigluGrad": Same("SwiGluHalvesGrad", (0, 1)),
    "FlashAttentionScore": flash_attention,
    "FlashAttentionScoreGrad": flash_attention_grad,
    "GroupedMatmul": grouped_matmul,
    "Embedding": Same("Embedding", (1, 0)),
    "EmbeddingDenseBackward": Same("EmbeddingGrad", (0, 1)),
    "TopkExt": largest,
    "MoeTokenPermute": Same("TokenPermute", (0, 1)),
    "MoeTokenPermuteGrad": Same("TokenPermuteGrad", (0, 1)),
    "InnerMoeTokenUnpermute": Same("TokenUnpermute", (0, 1, 2)),
    "MoeTokenUnpermuteGrad": Same("TokenUnpermuteGrad", (1, 0, 2, 3)),
}
