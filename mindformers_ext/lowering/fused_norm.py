"""The sum of squares of all gradients of a rank as one operator, in place of four for every gradient.

Extends lowering.py: `ClipGradNorm` in a rank's graph adds the squares of each gradient up, divides what several ranks
hold by their number, and adds the sums. See cpu_kernels/adamw.cc. A number that all gradients were multiplied with
before (the loss scale taken out) multiplies the sum.
"""

from mindformers_ext.lowering.graph import Graph, constant
from mindformers_ext.lowering.patterns import NoMatch, op

SUM = op("SumExt", op("Square", "gradient"), "axes", "keep", "dtype")
TERM = op("ExpandDims", SUM, "place")
SHARED_TERM = op("ExpandDims", op("RealDiv", SUM, "ranks"), "place")


def fuse_norms(graph: Graph) -> None:
    """Replace every sum of squares of several tensors in the main graph."""
    for node in list(graph.nodes):
        if graph.operator(node) != "AddN":
            continue
        kind, terms = graph.maker(node.input[0])
        if kind != "MakeTuple" or graph.dims(node.output[0]) != [1]:
            continue
        try:
            found = [_term(graph, name) for name in terms.input]
        except NoMatch:
            continue
        weights = graph.add(constant(f"{node.name}/weights", [1 / ranks for _, ranks in found]))
        scaled = [gradient for gradient, _ in found]
        gradients, numbers = graph.unscaled(scaled)
        graph.kernel(node, "WeightedSquareSum", [weights.output[0], *gradients])
        if numbers:
            _wait_for(graph, dict(zip(scaled, gradients, strict=True)))
            output = node.output[0]
            graph.rename(node, f"{output}/unscaled")
            graph.product(output, [node.output[0], *numbers, *numbers])


def _wait_for(graph: Graph, sources: dict[str, str]) -> None:
    """Let tuples that are only waited for hold what the values are made of: the values need not be computed."""
    used = {entry.name for entry in graph.model.graph.output}
    for node in graph.nodes:
        used.update(node.input[:1] if graph.operator(node) == "Depend" else node.input)
    for node in graph.nodes:
        if graph.operator(node) == "MakeTuple" and node.output[0] not in used:
            node.input[:] = [sources.get(name, name) for name in node.input]


def _term(graph: Graph, name: str) -> tuple[str, float]:
    """A gradient whose squares are added up, and by what the sum is divided. Raises NoMatch."""
    found = graph.match_one(name, (TERM, SHARED_TERM))
    gradient, axes = found["gradient"], graph.integers(found["axes"])
    rank = len(graph.dims(gradient))
    whole = not axes or {axis % rank for axis in axes} == set(range(rank))
    if not whole or graph.number(found["keep"]) or not graph.is_float(gradient):
        raise NoMatch("not the sum over a whole gradient")
    return gradient, graph.number(found["ranks"]) if "ranks" in found else 1.0
