"""Cross entropy in a rank's graph: five kernels in place of MindFormers' two dozen operators over all logits.

Extends lowering.py. MindFormers' CrossEntropyLoss writes exponentials, one-hot labels and their products out, each as
large as the logits; between them stand the collectives of a split vocabulary. See cpu_kernels/split_cross_entropy.cc.
A part that is not as written here stays as it is.
"""

from collections.abc import Callable

import mindspore.train.mind_ir_pb2 as pb

from mindformers_ext.lowering.fused_operators import Operator, replace
from mindformers_ext.lowering.patterns import Is, Nodes, NoMatch, op

SHIFTED = op("Sub", "logits", "highest")
LOG_PROBABILITY = op("Sub", SHIFTED, "log_sum")
CHOSEN = op("OneHot", "label", "depth", "one", "zero", "last")
HIGHEST = op("ReduceMax", "logits", "axis", "keep")
EXP_SUM = op("ReduceSum", op("Exp", SHIFTED), "axis", "keep", "skip")
LOSS = op("ReduceSum", op("Neg", op("Mul", LOG_PROBABILITY, CHOSEN)), "axis", "keep", "skip")
GRADIENT = op("Mul", op("Sub", op("Exp", LOG_PROBABILITY), CHOSEN), "gradient")
SCALED_GRADIENT = op("Muls", GRADIENT, "factor")
ADDED_ZERO = op("Add", "logits", "zero")


def fuse_losses(graph) -> None:
    """Replace the parts of cross entropy in the main graph."""
    nodes = Nodes(graph, graph.model.graph.node)
    for pattern, kernel in KERNELS:
        for node in graph.model.graph.node:
            found: dict[str, str] = {}
            try:
                nodes.match(node.output[0], pattern, found)
                kernel(nodes, node, found)
            except NoMatch:
                continue


def _logits(nodes: Nodes, found: dict[str, str]) -> str:
    """The logits (T, V'), without the zero that MindFormers adds. Raises NoMatch for another shape."""
    name = found["logits"]
    if len(nodes.dims(name)) != 2 or not nodes.is_float(name):
        raise NoMatch("not (T, V')")
    try:
        added: dict[str, str] = {}
        nodes.match(name, ADDED_ZERO, added)
        same = nodes.dims(added["logits"]) == nodes.dims(name) and nodes.number(added["zero"]) == 0
        return added["logits"] if same else name
    except NoMatch:
        return name


def _check_last_axis(nodes: Nodes, found: dict[str, str]) -> None:
    if nodes.integers(found["axis"]) not in ([1], [-1]):
        raise NoMatch("not over the vocabulary")


def _check_label(nodes: Nodes, found: dict[str, str]) -> None:
    values = [nodes.number(found[name]) for name in ("one", "zero")]
    if values != [1, 0] or nodes.integers(found["last"]) not in ([1], [-1]):
        raise NoMatch("no one-hot label")


def _row_max(nodes: Nodes, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_last_axis(nodes, found)
    replace(Operator(nodes.graph, node), "RowMax", [_logits(nodes, found)])


def _row_exp_sum(nodes: Nodes, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_last_axis(nodes, found)
    replace(Operator(nodes.graph, node), "RowExpSum", [_logits(nodes, found), found["highest"]])


def _loss(nodes: Nodes, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_last_axis(nodes, found)
    _check_label(nodes, found)
    inputs = [_logits(nodes, found), *(found[name] for name in ("highest", "log_sum", "label"))]
    replace(Operator(nodes.graph, node), "SplitCrossEntropy", inputs)


def _gradient(nodes: Nodes, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_label(nodes, found)
    logits = _logits(nodes, found)
    if nodes.dims(found["gradient"]) != [nodes.dims(logits)[0], 1]:
        raise NoMatch("not a gradient per token")
    inputs = [logits, *(found[name] for name in ("highest", "log_sum", "label", "gradient"))]
    factor = nodes.number(found["factor"]) if "factor" in found else 1.0
    replace(Operator(nodes.graph, node), "SplitCrossEntropyGrad", inputs, factor=factor)


# A scaled gradient comes before the gradient itself, whose node then has no user left.
KERNELS: tuple[tuple[Is, Callable], ...] = (
    (SCALED_GRADIENT, _gradient),
    (GRADIENT, _gradient),
    (LOSS, _loss),
    (EXP_SUM, _row_exp_sum),
    (HIGHEST, _row_max),
)
