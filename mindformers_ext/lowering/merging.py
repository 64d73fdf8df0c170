"""The order of a rank's collectives in its lowered graph, and small ones of one group merged into one operator.

Extends lowering.py. A compiled step has hundreds of collectives: the weights that optimizer parallelism gathers, the
gradients that it scatters, tables of angles. Each makes its group wait for its last rank, which costs most where ranks
share cores. Collectives that need no other run first, each one waits until a collective needs what it makes, and
AllReduce, AllGather and ReduceScatter of one group and type that wait together become one. Every rank of a group has
the same collectives in the same order, so all decide alike; deadlock.check proves it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mindformers_ext.collectives.collectives import library_path
from mindformers_ext.lowering.calls import Call
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir

MERGED = ("AllReduce", "AllGather", "ReduceScatter")


@dataclass(frozen=True)
class Placed:
    """A collective of the graph: the output of its node, and what it does."""

    output: str
    call: Call
    attributes: dict


def merge(graph) -> list[Call]:
    """Merge and chain the collectives of a Graph, in place; returns the calls in their new order."""
    graph.sort()
    placed = graph.collectives
    before = _dependencies(graph.nodes, placed)
    order = sorted(range(len(placed)), key=lambda i: before[i] != 0)  # stable: those that need no other come first
    calls, previous = [], None
    for members in _groups(placed, before, order):
        node = graph.made_by[members[0].output] if len(members) == 1 else _one_operator(graph, members)
        if previous is not None:
            node.input.append(previous)
        previous = node.output[0]
        calls.append(_merged_call(members))
    graph.sort()
    return calls


def _dependencies(nodes: Iterable[pb.NodeProto], placed: list[Placed]) -> list[int]:
    """For each collective the set of collectives that it depends on, as bits."""
    number = {entry.output: i for i, entry in enumerate(placed)}
    reached: dict[str, int] = {}
    before = [0] * len(placed)
    for node in nodes:
        bits = 0
        for name in node.input:
            bits |= reached.get(name, 0)
        own = number.get(node.output[0])
        if own is not None:
            before[own] = bits
            bits |= 1 << own
        reached[node.output[0]] = bits
    return before


def _groups(placed: list[Placed], before: list[int], order: list[int]) -> Iterator[list[Placed]]:
    """Lists of collectives that can run as one, in the order in which they run."""
    waiting: dict[tuple, list[int]] = {}
    for i in order:
        call = placed[i].call
        for key in [key for key, members in waiting.items() if any(before[i] >> m & 1 for m in members)]:
            yield [placed[m] for m in waiting.pop(key)]
        if call.operation in MERGED:
            waiting.setdefault((call.operation, call.ranks, call.detail, call.dtype), []).append(i)
        else:
            yield [placed[i]]
    for members in waiting.values():
        yield [placed[m] for m in members]


def _merged_call(members: list[Placed]) -> Call:
    first = members[0].call
    if len(members) == 1:
        return first
    sizes = tuple(member.call.elements for member in members)
    return replace(
        first,
        detail=(*first.detail, ("elements", sizes)),
        elements=sum(sizes),
        bytes=sum(member.call.bytes for member in members),
        where=f"{first.where} and {len(members) - 1} more",
    )


def _one_operator(graph, members: list[Placed]) -> pb.NodeProto:
    """A new node that does the work of all members; they take their results from its tuple."""
    name = f"{members[0].output}/together"
    together = pb.NodeProto(name=name, output=[name], domain=graph.made_by[members[0].output].domain)
    shape = together.attribute.add(name="shape", type=pb.AttributeProto.TUPLE)
    for index, member in enumerate(members):
        node = graph.made_by[member.output]
        together.input.append(node.input[0])
        shape.values.add(type=pb.AttributeProto.TENSORS, tensors=mindir.attribute(node, "shape").tensors)
        graph.use(node, "TupleGetItem")
        node.input[:] = [name, graph.integer(index)]
    graph.custom(together, f"{library_path()}:Collective", **members[0].attributes, tensors=len(members))
    return graph.add(together)
