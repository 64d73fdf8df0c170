"""Lower the graph that an Ascend rank would run (MindIR) to one that MindSpore's CPU backend runs.

Extends MindSpore 2.9.0, which cannot run semi-auto parallel graphs on CPU: functions are inlined, communication
operators become the Custom operators of collective_op.cc (each takes the previous one's output as an extra input, so
that their order never changes; see merging.py), and operators without a CPU kernel are rewritten by the functions in
`REWRITES`.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path

from mindformers_ext.collectives.collectives import library_path
from mindformers_ext.files.atomic import whole_file
from mindformers_ext.lowering.basic_operators import use_our_kernels
from mindformers_ext.lowering.bounded_rows import add_rows, bound_rows, places, take_rows
from mindformers_ext.lowering.calls import Call, write_calls
from mindformers_ext.lowering.fused_loss import fuse_losses
from mindformers_ext.lowering.fused_norm import fuse_norms
from mindformers_ext.lowering.fused_operators import FUSED_REWRITES
from mindformers_ext.lowering.fused_update import fuse_updates
from mindformers_ext.lowering.graph import Graph, made
from mindformers_ext.lowering.inlining import inline_functions
from mindformers_ext.lowering.merging import Placed, merge
from mindformers_ext.lowering.patterns import NoMatch
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.mindir import DTYPE_BYTES, WORLD_GROUP, attribute, attributes_of


def lower_into(folder: Path, model: pb.ModelProto, rank: int, world_size: int) -> None:
    """Lower a rank's graph, which changes `model`; write `cpu.mindir` and `calls.json` (see calls.py)."""
    calls = lower(model, rank, world_size)
    with whole_file(folder / "cpu.mindir") as partial:
        partial.write_bytes(model.SerializeToString())
    write_calls(folder / "calls.json", calls)


def lower(model: pb.ModelProto, rank: int, world_size: int) -> list[Call]:
    """Rewrite `model` in place for CPU; returns the rank's collectives in the order in which they will run.

    Raises ValueError with the operator's name when a communication operator is not known.
    """
    inline_functions(model)
    graph = Graph(model, rank, world_size)
    bound_rows(graph)
    for node in list(graph.nodes):
        _rewrite(graph, node)
    for function in model.functions:
        for node in function.node:
            _rewrite_optional(graph, function, node)
    fuse_losses(graph)
    fuse_norms(graph)
    use_our_kernels(graph)
    _keep_behind_additions(graph)
    fuse_updates(graph)
    return merge(graph)


def _rewrite(graph: Graph, node: pb.NodeProto) -> None:
    rewrite = REWRITES.get(graph.operator(node))
    if rewrite is not None:
        rewrite(graph, node)


def _rewrite_optional(graph: Graph, function: pb.GraphProto, node: pb.NodeProto) -> None:
    """Rewrite a node of a function that may or may not run: it must not communicate."""
    primitive, communicates = graph.primitive(node), len(graph.collectives)
    _rewrite(graph, node)
    if len(graph.collectives) > communicates:
        raise ValueError(
            f"'{primitive.op_type}' ({primitive.instance_name}) is in function '{function.name}', which runs only when "
            "a value computed in the step says so: ranks that decide differently would wait for each other for ever"
        )


def _keep_behind_additions(graph: Graph) -> None:
    """Let whatever takes a gradient buffer after an addition to it depend on that addition.

    MindSpore lets the buffer's reduction depend on a sum of zeros, each of which depends on the addition of one
    micro-batch. Its CPU backend drops zeros from sums, and with them all but one of the additions. Schedulers put a
    Depend between a buffer and some of its additions.
    """
    added: dict[str, str] = {}  # buffer: output of the last addition
    for node in list(graph.nodes):
        for place, name in enumerate(node.input):
            buffer, waits_for = _buffer(graph, name)
            if added.get(buffer, name) not in (name, *waits_for):
                output = f"{node.output[0]}/after{place}"
                graph.use(graph.add(made(f"{node.name}/after{place}", [name, added[buffer]], output)), "Depend")
                node.input[place] = output
        if graph.operator(node) == "AssignAdd":
            added[_buffer(graph, node.input[0])[0]] = node.output[0]


def _buffer(graph: Graph, name: str) -> tuple[str, list[str]]:
    """What `name` is, and what it waits for."""
    waits_for = []
    while graph.maker(name)[0] == "Depend":
        name, waited = graph.made_by[name].input[:2]
        waits_for.append(waited)
    return name, waits_for


def group_ranks(graph: Graph, node: pb.NodeProto, attributes: dict) -> tuple[int, ...]:
    """Global ranks of a communication operator's group."""
    if "group_rank_ids" in attributes:
        return tuple(attributes["group_rank_ids"])
    if attributes.get("group") == WORLD_GROUP:
        return tuple(range(graph.world_size))
    primitive = graph.primitive(node)
    raise ValueError(f"'{primitive.op_type}' ({primitive.instance_name}) does not say which ranks its group has")


def collective(*same: str) -> Callable:
    """Rewriter of a group operation; `same` are its attributes by which the ranks must agree."""

    def rewrite(graph: Graph, node: pb.NodeProto) -> None:
        operation, attributes = graph.operator(node), attributes_of(graph.primitive(node))
        ranks = group_ranks(graph, node, attributes)
        extra = {"reduce" if name == "op" else name: attributes[name] for name in same}
        if "root_rank" in extra:
            extra["root"] = ranks[extra.pop("root_rank")]
        _place(graph, node, operation, ranks, tuple(extra.items()), rank_list=ranks, **extra)

    return rewrite


def all_to_all_v(graph: Graph, node: pb.NodeProto) -> None:
    """Rewriter of AlltoAllV(x, counts to send, counts to receive), in blocks: constants, or computed in the step."""
    attributes = attributes_of(graph.primitive(node))
    ranks = group_ranks(graph, node, attributes)
    if node.input[1] not in graph.constants:
        block = attributes.get("block_size", 1)
        return _place(graph, node, "AlltoAllV", ranks, (), rank_list=ranks, block=block)
    sent, received = (_counts(graph, name, attributes) for name in node.input[1:3])
    _exchange(graph, node, ranks, sent, received)


def all_to_all_vc(graph: Graph, node: pb.NodeProto) -> None:
    """Rewriter of AlltoAllVC(x, what every rank sends to every other), the matrix written row by row."""
    attributes = attributes_of(graph.primitive(node))
    ranks, own = group_ranks(graph, node, attributes), attributes["rank_id"]
    counts = _counts(graph, node.input[1], attributes)
    sent, received = counts[own * len(ranks) : (own + 1) * len(ranks)], counts[own :: len(ranks)]
    if attributes.get("transpose"):
        sent, received = received, sent
    _exchange(graph, node, ranks, sent, received)


def _counts(graph: Graph, name: str, attributes: dict) -> list[int]:
    """Elements of an uneven exchange from a constant in blocks. Raises ValueError when it is computed."""
    try:
        return [attributes.get("block_size", 1) * count for count in graph.integers(name)]
    except NoMatch:
        raise ValueError(
            f"'{name}' says how much is sent, but is computed in the step: only constants can be lowered"
        ) from None


def _exchange(graph: Graph, node: pb.NodeProto, ranks: tuple[int, ...], sent: list, received: list) -> None:
    del node.input[1:]
    counts = (tuple(sent), tuple(received))
    _place(graph, node, "AlltoAllV", ranks, counts, rank_list=ranks, send_counts=sent, recv_counts=received)


def message(graph: Graph, node: pb.NodeProto) -> None:
    """Rewriter of Send and Receive."""
    attributes, operation = attributes_of(graph.primitive(node)), graph.operator(node)
    sends, tag = operation == "Send", attributes["sr_tag"]
    peer = group_ranks(graph, node, attributes)[attributes["dest_rank" if sends else "src_rank"]]
    ranks = (graph.rank, peer) if sends else (peer, graph.rank)
    _place(graph, node, operation, ranks, (tag,), peer=peer, tag=tag)


def _place(
    graph: Graph, node: pb.NodeProto, operation: str, ranks: tuple[int, ...], detail: tuple, **attributes
) -> None:
    """Make `node` our Custom operator; `merging.merge` puts it behind the previous one."""
    attributes = {"collective": operation, **attributes}
    graph.custom(node, f"{library_path()}:Collective", **attributes)
    shape = attribute(node, "shape")
    if not shape.tensors:
        raise ValueError(f"node '{node.name}' has no static shape; dynamic shapes cannot be lowered")
    elements, dtype = prod(shape.tensors[0].dims), pb.TensorProto.DataType.Name(shape.tensors[0].data_type)
    call = Call(operation, ranks, detail, dtype.lower(), elements, elements * DTYPE_BYTES[dtype], node.domain)
    graph.collectives.append(Placed(node.output[0], call, attributes))


def passes_on(graph: Graph, node: pb.NodeProto) -> None:
    """Rewriter of what only copies its first input here.

    MoveTo is to the device's own memory; the NPU's float status register, which CPU has not, starts clear.
    """
    del node.input[1:]
    graph.use(node, "TensorMove")


# Every operator of a rank's graph that CPU MindSpore cannot run as it is, and how it is replaced.
REWRITES: dict[str, Callable[[Graph, pb.NodeProto], None]] = {
    "AllReduce": collective("op"),
    "AllGather": collective(),
    "ReduceScatter": collective("op"),
    "AlltoAll": collective("split_dim", "concat_dim"),
    "AlltoAllV": all_to_all_v,
    "AlltoAllVC": all_to_all_vc,
    "Broadcast": collective("root_rank"),
    "Send": message,
    "Receive": message,
    "NPUGetFloatStatusV2": passes_on,
    "NPUClearFloatStatusV2": passes_on,
    "MoveTo": passes_on,
    "NonZero": places,
    "IndexSelect": take_rows,
    "IndexAddExt": add_rows,
    **FUSED_REWRITES,
}
