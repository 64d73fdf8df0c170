"""Cross entropy in a rank's graph: five kernels in place of MindFormers' two dozen operators over all logits.

Extends lowering.py. MindFormers' CrossEntropyLoss writes exponentials, one-hot labels and their products out, each as
large as the logits; between them stand the collectives of a split vocabulary. See cpu_kernels/split_cross_entropy.cc.
A part that is not as written here stays as it is.
"""

from collections.abc import Callable
from contextlib import suppress

from mindformers_ext.lowering.graph import Graph
from mindformers_ext.lowering.patterns import Is, NoMatch, op
from mindformers_ext.rank_compiler import mind_ir as pb

SHIFTED = op("Sub", "logits", "highest")
LOG_PROBABILITY = op("Sub", SHIFTED, "log_sum")
CHOSEN = op("OneHot", "label", "depth", "one", "zero", "last")
HIGHEST = op("ReduceMax", "logits", "axis", "keep")
EXP_SUM = op("ReduceSum", op("Exp", SHIFTED), "axis", "keep", "skip")
LOSS = op("ReduceSum", op("Neg", op("Mul", LOG_PROBABILITY, CHOSEN)), "axis", "keep", "skip")
GRADIENT = op("Mul", op("Sub", op("Exp", LOG_PROBABILITY), CHOSEN), "gradient")
SCALED_GRADIENT = op("Muls", GRADIENT, "factor")
ADDED_ZERO = op("Add", "logits", "zero")


def fuse_losses(graph: Graph) -> None:
    """Replace the parts of cross entropy in the main graph."""
    for pattern, kernel in KERNELS:
        for node in graph.nodes:
            with suppress(NoMatch):
                kernel(graph, node, graph.match(node.output[0], pattern))


def _logits(graph: Graph, found: dict[str, str]) -> str:
    """The logits (T, V'), without the zero that MindFormers adds. Raises NoMatch for another shape."""
    name = found["logits"]
    if len(graph.dims(name)) != 2 or not graph.is_float(name):
        raise NoMatch("not (T, V')")
    try:
        added = graph.match(name, ADDED_ZERO)
        same = graph.dims(added["logits"]) == graph.dims(name) and graph.number(added["zero"]) == 0
        return added["logits"] if same else name
    except NoMatch:
        return name


def _check_last_axis(graph: Graph, found: dict[str, str]) -> None:
    if graph.integers(found["axis"]) not in ([1], [-1]):
        raise NoMatch("not over the vocabulary")


def _check_label(graph: Graph, found: dict[str, str]) -> None:
    values = [graph.number(found[name]) for name in ("one", "zero")]
    if values != [1, 0] or graph.integers(found["last"]) not in ([1], [-1]):
        raise NoMatch("no one-hot label")


def _row_max(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_last_axis(graph, found)
    graph.kernel(node, "RowMax", [_logits(graph, found)])


def _row_exp_sum(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_last_axis(graph, found)
    graph.kernel(node, "RowExpSum", [_logits(graph, found), found["highest"]])


def _loss(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_last_axis(graph, found)
    _check_label(graph, found)
    inputs = [_logits(graph, found), *(found[name] for name in ("highest", "log_sum", "label"))]
    graph.kernel(node, "SplitCrossEntropy", inputs)


def _gradient(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check_label(graph, found)
    logits = _logits(graph, found)
    if graph.dims(found["gradient"]) != [graph.dims(logits)[0], 1]:
        raise NoMatch("not a gradient per token")
    inputs = [logits, *(found[name] for name in ("highest", "log_sum", "label", "gradient"))]
    factor = graph.number(found["factor"]) if "factor" in found else 1.0
    graph.kernel(node, "SplitCrossEntropyGrad", inputs, factor=factor)


# A scaled gradient comes before the gradient itself, whose node then has no user left.
KERNELS: tuple[tuple[Is, Callable], ...] = (
    (SCALED_GRADIENT, _gradient),
    (GRADIENT, _gradient),
    (LOSS, _loss),
    (EXP_SUM, _row_exp_sum),
    (HIGHEST, _row_max),
)
