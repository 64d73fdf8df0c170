"""Cross entropy in a rank's graph (layers/vocabulary.py): a kernel for each part that reads all logits.

Extends lowering.py. Between the parts stand the collectives of a split vocabulary, and arithmetic on a number a token,
which stays. See cpu_kernels/split_cross_entropy.cc. A part that is not as written here stays as it is.
"""

from collections.abc import Callable
from contextlib import suppress

from mindformers_ext.lowering.graph import Graph
from mindformers_ext.lowering.patterns import Is, NoMatch, op
from mindformers_ext.rank_compiler import mind_ir as pb

PICKED = op("GatherD", "logits", "axis", "place")
PICKED_LOG = op("GatherD", op("LogSoftmax", "logits", "last"), "axis", "place")
GRADIENT = op("ScatterAddExt", op("Mul", op("Softmax", "logits", "last"), "gradient"), "axis", "place", "addend")


def fuse_losses(graph: Graph) -> None:
    """Replace the parts of cross entropy in the main graph."""
    for pattern, kernel in KERNELS:
        for node in graph.nodes:
            with suppress(NoMatch):
                kernel(graph, node, graph.match(node.output[0], pattern))


def _check(graph: Graph, found: dict[str, str], *rows: str) -> None:
    """Raises NoMatch unless all is over the last axis of logits (T, V'), and `rows` have one number a token."""
    shape = graph.dims(found["logits"])
    if len(shape) != 2 or not graph.is_float(found["logits"]) or graph.integers(found["axis"]) not in ([1], [-1]):
        raise NoMatch("not over the vocabulary")
    if any(graph.dims(found[name]) != [shape[0], 1] for name in rows):
        raise NoMatch("not a number per token")


def _picked(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check(graph, found, "place")
    graph.kernel(node, "PickColumn", [found["logits"], found["place"]])


def _picked_log(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    _check(graph, found, "place")
    _check(graph, found | {"axis": found["last"]})
    graph.kernel(node, "PickLogSoftmax", [found["logits"], found["place"]])


def _gradient(graph: Graph, node: pb.NodeProto, found: dict[str, str]) -> None:
    names = ("gradient", "place", "addend")
    _check(graph, found, *names)
    _check(graph, found | {"axis": found["last"]})
    graph.kernel(node, "SplitCrossEntropyGrad", [found["logits"], *(found[name] for name in names)])


KERNELS: tuple[tuple[Is, Callable], ...] = (
    (GRADIENT, _gradient),
    (PICKED_LOG, _picked_log),
    (PICKED, _picked),
)
