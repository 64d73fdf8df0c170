"""Ascend's fused operators in a rank's graph, and the CPU kernel that each becomes.

Extends lowering.py with the operators of `cpu_kernels`, so that a graph compiled with use_flash_attention, use_gmm,
use_fused_ops_permute ... runs on CPU as it was compiled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mindspore.train.mind_ir_pb2 as pb

from mindformers_ext.cpu_kernels.library import library_path

CAUSAL, CAUSAL_TO_LAST, BAND, BY_MASK = 2, 3, 4, 0  # sparse_mode of FlashAttentionScore


class Operator:
    """A node of the graph that is being lowered, with its inputs read back from where they are made."""

    def __init__(self, graph, node: pb.NodeProto):
        self.graph, self.node = graph, node

    def made_by(self, name: str) -> tuple[str, pb.NodeProto | None]:
        """Operator that makes value `name`, and its node."""
        node = self.graph.producers.get(name)
        primitive = self.graph.primitive(node) if node is not None else None
        return (primitive.op_type if primitive is not None else ""), node

    def constant(self, index: int) -> Any:
        """Value of a constant number input; None for None."""
        node = self.graph.producers[self.node.input[index]]
        value = next(attribute for attribute in node.attribute if attribute.name == "value")
        if value.type == pb.AttributeProto.NONE:
            return None
        return value.f if value.type == pb.AttributeProto.FLOAT else value.i

    def element(self, index: int) -> str:
        """The only tensor of a tuple input."""
        kind, node = self.made_by(self.node.input[index])
        if kind != "MakeTuple" or len(node.input) != 1:
            raise ValueError(f"input {index} of '{self.node.name}' is not a tuple of one tensor")
        return node.input[0]

    def untransposed(self, name: str) -> str | None:
        """What `name` is the transpose of (of its last two axes); None when it is no transpose."""
        kind, node = self.made_by(name)
        return node.input[0] if kind == "TransposeExtView" else None


def replace(operator: Operator, kernel: str, inputs: Sequence[str], **attributes: float) -> None:
    """Make the node apply `kernel` of the library to `inputs`."""
    numbers = {name: repr(float(value)) for name, value in attributes.items()}
    operator.graph.custom(operator.node, f"{library_path()}:{kernel}", **numbers)
    del operator.node.input[:]
    operator.node.input.extend(inputs)


def _shape(node: pb.NodeProto) -> pb.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == "shape")


@dataclass(frozen=True)
class Same:
    """A kernel that takes some of the Ascend operator's inputs, in this order, and writes the same outputs."""

    kernel: str
    inputs: tuple[int, ...]
    attributes: Callable[[Operator], dict[str, float]] = lambda _: {}

    def __call__(self, graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
        operator = Operator(graph, node)
        attributes = self.attributes(operator)
        replace(operator, self.kernel, [node.input[i] for i in self.inputs], **attributes)


def attention_attributes(operator: Operator, scale: int) -> dict[str, float]:
    """Scale and diagonal from the constants that begin with the scale (FlashAttentionScore's order)."""
    value, before, after, _, _, mode = (operator.constant(scale + i) for i in range(6))
    query, key = (_dims(operator.graph.producers[operator.node.input[i]]) for i in (0, 1))
    to_last = key[2] - query[2]
    if mode == BAND and before < query[2] + abs(to_last):
        raise ValueError(f"'{operator.node.name}' attends to a band of {before} earlier keys, which CPU does not know")
    diagonals = {CAUSAL: 0, CAUSAL_TO_LAST: to_last, BAND: to_last + after, BY_MASK: 0}
    if mode not in diagonals:
        raise ValueError(f"'{operator.node.name}' has sparse_mode {mode}; CPU knows {sorted(diagonals)}")
    return {"scale": value, "diagonal": diagonals[mode]}


def _dims(node: pb.NodeProto) -> list[int]:
    return list(_shape(node).tensors[0].dims)


def flash_attention(graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """FlashAttentionScore(query, key, value, ..., attn_mask at 6, ..., scale at 12, ..., sparse_mode at 17)."""
    operator = Operator(graph, node)
    attributes = attention_attributes(operator, 12)
    masked = operator.constant(17) == BY_MASK
    replace(operator, "FlashAttentionScore", [*node.input[:3], *([node.input[6]] if masked else [])], **attributes)


def flash_attention_grad(graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """FlashAttentionScoreGrad(query, key, value, dy, ..., attn_mask at 7, softmax_max at 8, ..., context at 11 ...)."""
    operator = Operator(graph, node)
    attributes = attention_attributes(operator, 17)
    masked = operator.constant(22) == BY_MASK
    order = (3, 0, 1, 2, 11, 8, 7) if masked else (3, 0, 1, 2, 11, 8)
    del _shape(node).values[3:]  # the gradient of the position bias, which is empty
    replace(operator, "FlashAttentionGrad", [node.input[i] for i in order], **attributes)


def grouped_matmul(graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """GroupedMatmul([x], [weight], ..., group_list at 7, ..., group_type at 9): a tuple of one result.

    MindSpore writes the gradients as products with transposes; the kernels take what was transposed.
    """
    operator = Operator(graph, node)
    x, weight, ends = operator.element(0), operator.element(1), node.input[7]
    of_x, of_weight = operator.untransposed(x), operator.untransposed(weight)
    if operator.constant(9) == 2:
        kernel, inputs = "GroupedMatmulWeightGrad", [of_x, weight, ends]
    elif of_weight is not None:
        kernel, inputs = "GroupedMatmulInputGrad", [x, of_weight, ends]
    else:
        kernel, inputs = "GroupedMatmul", [x, weight, ends]
    if None in inputs:
        raise ValueError(f"'{node.name}' sums over groups of rows, but its first input is not a transpose")
    graph.untuple(node)
    replace(operator, kernel, inputs)


FUSED_REWRITES: dict[str, Callable] = {
    "RmsNorm": Same("RmsNorm", (0, 1), lambda operator: {"eps": operator.constant(2)}),
    "RmsNormGrad": Same("RmsNormGrad", (0, 1, 2, 3)),
    "RotaryPositionEmbedding": Same("Rotary", (0, 1, 2), lambda _: {"direction": 1}),
    "RotaryPositionEmbeddingGrad": Same("Rotary", (0, 1, 2), lambda _: {"direction": -1}),
    "Swiglu": Same("SwiGluHalves", (0,)),
    "SwigluGrad": Same("SwiGluHalvesGrad", (0, 1)),
    "FlashAttentionScore": flash_attention,
    "FlashAttentionScoreGrad": flash_attention_grad,
    "GroupedMatmul": grouped_matmul,
    "MoeTokenPermute": Same("TokenPermute", (0, 1)),
    "MoeTokenPermuteGrad": Same("TokenPermuteGrad", (0, 1)),
    "InnerMoeTokenUnpermute": Same("TokenUnpermute", (0, 1, 2)),
    "MoeTokenUnpermuteGrad": Same("TokenUnpermuteGrad", (1, 0, 2, 3)),
}
