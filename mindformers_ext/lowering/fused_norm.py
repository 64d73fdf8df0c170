"""The sum of squares of all gradients of a rank as one operator, in place of four for every gradient.

Extends lowering.py: `ClipGradNorm` in a rank's graph adds the squares of each gradient up, divides what several ranks
hold by their number, and adds the sums. See cpu_kernels/adamw.cc. A number that all gradients were multiplied with
before (the loss scale taken out) multiplies the sum.
"""

from mindformers_ext.lowering.fused_operators import Operator, replace
from mindformers_ext.lowering.patterns import Nodes, NoMatch, constant, op, product

SUM = op("SumExt", op("Square", "gradient"), "axes", "keep", "dtype")
TERM = op("ExpandDims", SUM, "place")
SHARED_TERM = op("ExpandDims", op("RealDiv", SUM, "ranks"), "place")


def fuse_norms(graph) -> None:
    """Replace every sum of squares of several tensors in the main graph."""
    nodes = Nodes(graph, graph.model.graph.node)
    for node in list(graph.model.graph.node):
        if nodes.operator(node) != "AddN":
            continue
        terms = nodes.nodes.get(node.input[0])
        if nodes.operator(terms) != "MakeTuple" or nodes.dims(node.output[0]) != [1]:
            continue
        try:
            found = [_term(nodes, name) for name in terms.input]
        except NoMatch:
            continue
        weights = constant(f"{node.name}/weights", [1 / ranks for _, ranks in found])
        graph.model.graph.node.append(weights)
        scaled = [gradient for gradient, _ in found]
        gradients, numbers = nodes.unscaled(scaled)
        replace(Operator(graph, node), "WeightedSquareSum", [weights.output[0], *gradients])
        if numbers:
            _wait_for(nodes, dict(zip(scaled, gradients, strict=True)))
            output = node.output[0]
            node.output[0] = f"{output}/unscaled"
            product(graph, output, [node.output[0], *numbers, *numbers])


def _wait_for(nodes: Nodes, sources: dict[str, str]) -> None:
    """Let tuples that are only waited for hold what the values are made of: the values need not be computed."""
    main = nodes.graph.model.graph
    used = {entry.name for entry in main.output}
    for node in main.node:
        used.update(node.input[:1] if nodes.operator(node) == "Depend" else node.input)
    for node in main.node:
        if nodes.operator(node) == "MakeTuple" and node.output[0] not in used:
            node.input[:] = [sources.get(name, name) for name in node.input]


def _term(nodes: Nodes, name: str) -> tuple[str, float]:
    """A gradient whose squares are added up, and by what the sum is divided. Raises NoMatch."""
    found: dict[str, str] = {}
    try:
        nodes.match(name, TERM, found)
    except NoMatch:
        found = {}
        nodes.match(name, SHARED_TERM, found)
    gradient, axes = found["gradient"], nodes.integers(found["axes"])
    rank = len(nodes.dims(gradient))
    whole = not axes or {axis % rank for axis in axes} == set(range(rank))
    if not whole or nodes.number(found["keep"]) or not nodes.is_float(gradient):
        raise NoMatch("not the sum over a whole gradient")
    return gradient, nodes.number(found["ranks"]) if "ranks" in found else 1.0
