"""Lower the graph that an Ascend rank would run (MindIR) to one that MindSpore's CPU backend runs.

Extends MindSpore 2.9.0, which cannot run semi-auto parallel graphs on CPU: functions are inlined, communication
operators become the Custom operators of collective_op.cc (each takes the previous one's output as an extra input, so
that their order never changes; see merging.py), and operators without a CPU kernel are rewritten by the functions in
`REWRITES`.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

import mindspore.train.mind_ir_pb2 as pb

from mindformers_ext.collectives.collectives import library_path
from mindformers_ext.files.atomic import whole_file
from mindformers_ext.lowering.basic_operators import use_our_kernels
from mindformers_ext.lowering.calls import Call, write_calls
from mindformers_ext.lowering.fused_loss import fuse_losses
from mindformers_ext.lowering.fused_norm import fuse_norms
from mindformers_ext.lowering.fused_operators import FUSED_REWRITES
from mindformers_ext.lowering.fused_update import fuse_updates
from mindformers_ext.lowering.inlining import inline_functions, reference
from mindformers_ext.lowering.merging import Placed, merge
from mindformers_ext.rank_compiler.mindir import DTYPE_BYTES


@dataclass
class Graph:
    """A flat MindIR model while it is being lowered."""

    model: pb.ModelProto
    rank: int
    world_size: int
    primitives: dict[str, pb.PrimitiveProto]
    collectives: list[Placed] = field(default_factory=list)

    @cached_property
    def producers(self) -> dict[str, pb.NodeProto]:
        """The node that makes each value."""
        return {node.output[0]: node for node in self.model.graph.node}

    def primitive(self, node: pb.NodeProto) -> pb.PrimitiveProto | None:
        return self.primitives.get(reference(node))

    def untuple(self, node: pb.NodeProto) -> None:
        """Let `node`, which makes a tuple of one tensor, make the tensor, and another node the tuple."""
        name = node.output[0]
        shape = next(attribute for attribute in node.attribute if attribute.name == "shape")
        element = pb.AttributeProto(name="shape", type=pb.AttributeProto.TENSORS, tensors=shape.values[0].tensors)
        shape.CopyFrom(element)
        node.output[0] = f"{name}/element"
        tuple_node = pb.NodeProto(name=f"{node.name}/tuple", input=[node.output[0]], output=[name])
        self.use(tuple_node, "MakeTuple")
        nodes = self.model.graph.node
        nodes.insert(next(i for i, other in enumerate(nodes) if other is node) + 1, tuple_node)

    def integer(self, value: int) -> str:
        """A constant number of the main graph."""
        name = f"integer:lowered{value}"
        if name not in self.producers:
            node = self.model.graph.node.add(name=name, output=[name], op_type="Constant")
            node.attribute.add(name="value", i=value, type=pb.AttributeProto.INT64)
            self.producers[name] = node
        return name

    def use(self, node: pb.NodeProto, operator: str, **attributes) -> None:
        """Make `node` apply a new primitive."""
        name = f"{operator}:lowered{len(self.primitives)}"
        primitive = self.model.primitives.add(name=name, op_type=operator, instance_name="op")
        primitive.prim_type = pb.PrimitiveProto.PRIMITIVE
        for key, value in attributes.items():
            set_attribute(primitive, key, value)
        self.primitives[name] = primitive
        node.op_type = f"REF::{name}"

    def custom(self, node: pb.NodeProto, function: str, **attributes) -> None:
        """Make `node` the Custom operator `function` of a library of ours (PATH:NAME)."""
        outputs = next(attribute for attribute in node.attribute if attribute.name == "shape").values
        self.use(
            node,
            "Custom",
            imply_path="",
            func_type="aot",
            func_name=function,
            uniq_name=f"Custom_{function}",
            multi_output=len(outputs) > 1,
            autodiff=False,
            **attributes,
        )


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
    graph = Graph(model, rank, world_size, {primitive.name: primitive for primitive in model.primitives})
    for node in list(model.graph.node):
        primitive = graph.primitive(node)
        rewrite = REWRITES.get(primitive.op_type) if primitive is not None else None
        if rewrite is not None:
            rewrite(graph, node, primitive)
    for function in model.functions:
        for node in function.node:
            _rewrite_optional(graph, function, node)
    fuse_losses(graph)
    fuse_norms(graph)
    use_our_kernels(graph)
    _keep_behind_additions(graph)
    fuse_updates(graph)
    return merge(graph, graph.collectives)


def _keep_behind_additions(graph: Graph) -> None:
    """Let whatever takes a gradient buffer after an addition to it depend on that addition.

    MindSpore lets the buffer's reduction depend on a sum of zeros, each of which depends on the addition of one
    micro-batch. Its CPU backend drops zeros from sums, and with them all but one of the additions.
    """
    added: dict[str, str] = {}  # buffer: output of the last addition
    nodes = []
    for node in graph.model.graph.node:
        buffers = list(node.input)
        for place, buffer in enumerate(buffers):
            if buffer in added:
                after = pb.NodeProto(name=f"{node.name}/after{place}", input=[buffer, added[buffer]])
                after.output.append(f"{node.output[0]}/after{place}")
                graph.use(after, "Depend")
                nodes.append(after)
                node.input[place] = after.output[0]
        nodes.append(node)
        primitive = graph.primitive(node)
        if primitive is not None and primitive.op_type == "AssignAdd":
            added[buffers[0]] = node.output[0]
    nodes = [pb.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)


def _rewrite_optional(graph: Graph, function: pb.GraphProto, node: pb.NodeProto) -> None:
    """Rewrite a node of a function that may or may not run: it must not communicate."""
    primitive = graph.primitive(node)
    rewrite = REWRITES.get(primitive.op_type) if primitive is not None else None
    communicates = len(graph.collectives)
    if rewrite is not None:
        rewrite(graph, node, primitive)
    if len(graph.collectives) > communicates:
        raise ValueError(
            f"'{primitive.op_type}' ({primitive.instance_name}) is in function '{function.name}', which runs only when "
            "a value computed in the step says so: ranks that decide differently would wait for each other for ever"
        )


def set_attribute(primitive: pb.PrimitiveProto, name: str, value) -> None:
    """Add an attribute: bool, int, str, or a sequence of integers."""
    attribute = primitive.attribute.add(name=name)
    if isinstance(value, bool):
        attribute.i, attribute.type = int(value), pb.AttributeProto.BOOL
    elif isinstance(value, int):
        attribute.i, attribute.type = value, pb.AttributeProto.INT64
    elif isinstance(value, str):
        attribute.s, attribute.type = value.encode(), pb.AttributeProto.STRING
    else:
        attribute.type = pb.AttributeProto.TUPLE
        for item in value:
            attribute.values.add(type=pb.AttributeProto.INT64).ints.append(item)


def attributes_of(primitive: pb.PrimitiveProto) -> dict:
    """The attributes of a primitive as plain values (integers, strings, lists of integers)."""
    plain = {}
    for attribute in primitive.attribute:
        if attribute.type == pb.AttributeProto.STRING:
            plain[attribute.name] = attribute.s.decode()
        elif attribute.type in (pb.AttributeProto.TUPLE, pb.AttributeProto.LIST):
            plain[attribute.name] = [value.ints[0] if value.ints else value.i for value in attribute.values]
        else:
            plain[attribute.name] = attribute.ints[0] if attribute.ints else attribute.i
    return plain


def output_tensor(node: pb.NodeProto) -> tuple[list[int], str]:
    """Shape and type (MindIR's name) of a node's output."""
    for attribute in node.attribute:
        if attribute.name == "shape" and attribute.tensors:
            tensor = attribute.tensors[0]
            return list(tensor.dims), pb.TensorProto.DataType.Name(tensor.data_type)
    raise ValueError(f"node '{node.name}' has no static shape; dynamic shapes cannot be lowered")


def group_ranks(graph: Graph, primitive: pb.PrimitiveProto, attributes: dict) -> tuple[int, ...]:
    """Global ranks of a communication operator's group."""
    if "group_rank_ids" in attributes:
        return tuple(attributes["group_rank_ids"])
    if attributes.get("group") == "hccl_world_group":
        return tuple(range(graph.world_size))
    raise ValueError(f"'{primitive.op_type}' ({primitive.instance_name}) does not say which ranks its group has")


def collective(*same: str) -> Callable:
    """Rewriter of a group operation; `same` are its attributes by which the ranks must agree."""

    def rewrite(graph: Graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
        attributes = attributes_of(primitive)
        ranks = group_ranks(graph, primitive, attributes)
        extra = {"reduce" if name == "op" else name: attributes[name] for name in same}
        if "root_rank" in extra:
            extra["root"] = ranks[extra.pop("root_rank")]
        detail = tuple(extra.items())
        _place(graph, node, primitive.op_type, ranks, detail, collective=primitive.op_type, rank_list=ranks, **extra)

    return rewrite


def all_to_all_v(graph: Graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """Rewriter of AlltoAllV(x, counts to send, counts to receive); both are constants, in blocks."""
    block = attributes_of(primitive).get("block_size", 1)
    sent, received = ([block * count for count in constant_integers(graph, name)] for name in node.input[1:3])
    _exchange(graph, node, primitive, sent, received)


def all_to_all_vc(graph: Graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """Rewriter of AlltoAllVC(x, what every rank sends to every other), the matrix written row by row."""
    attributes = attributes_of(primitive)
    size, own = len(group_ranks(graph, primitive, attributes)), attributes["rank_id"]
    counts = [attributes.get("block_size", 1) * count for count in constant_integers(graph, node.input[1])]
    sent, received = counts[own * size : (own + 1) * size], counts[own::size]
    if attributes.get("transpose"):
        sent, received = received, sent
    _exchange(graph, node, primitive, sent, received)


def _exchange(graph: Graph, node: pb.NodeProto, primitive: pb.PrimitiveProto, sent: list, received: list) -> None:
    ranks = group_ranks(graph, primitive, attributes_of(primitive))
    del node.input[1:]
    counts = (tuple(sent), tuple(received))
    extra = {"rank_list": ranks, "send_counts": sent, "recv_counts": received}
    _place(graph, node, "AlltoAllV", ranks, counts, collective="AlltoAllV", **extra)


def constant_integers(graph: Graph, name: str) -> list[int]:
    """A constant list of integers, from a tuple or a tensor. Raises ValueError when it is computed."""
    node = graph.producers.get(name)
    value = next((a for a in node.attribute if a.name == "value"), None) if node is not None else None
    if node is None or node.op_type != "Constant" or value is None:
        raise ValueError(f"'{name}' says how much is sent, but is computed in the step: only constants can be lowered")
    if value.tensors:
        width = DTYPE_BYTES[pb.TensorProto.DataType.Name(value.tensors[0].data_type)]
        return [count for (count,) in struct.iter_unpack({4: "<i", 8: "<q"}[width], value.tensors[0].raw_data)]
    return [item.ints[0] if item.ints else item.i for item in value.values]


def message(graph: Graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """Rewriter of Send and Receive."""
    attributes = attributes_of(primitive)
    sends = primitive.op_type == "Send"
    peer = group_ranks(graph, primitive, attributes)[attributes["dest_rank" if sends else "src_rank"]]
    tag, operation = attributes["sr_tag"], primitive.op_type
    ranks = (graph.rank, peer) if sends else (peer, graph.rank)
    _place(graph, node, operation, ranks, (tag,), collective=operation, peer=peer, tag=tag)


def _place(
    graph: Graph, node: pb.NodeProto, operation: str, ranks: tuple[int, ...], detail: tuple, **attributes
) -> None:
    """Make `node` our Custom operator; `merging.merge` puts it behind the previous one."""
    graph.custom(node, f"{library_path()}:Collective", **attributes)
    shape, dtype = output_tensor(node)
    elements = prod(shape)
    call = Call(operation, ranks, detail, dtype.lower(), elements, elements * DTYPE_BYTES[dtype], node.domain)
    graph.collectives.append(Placed(node.output[0], call, attributes))


def passes_on(graph: Graph, node: pb.NodeProto, primitive: pb.PrimitiveProto) -> None:
    """Rewriter of the NPU's float status register, which starts clear: CPU has none, so the status stays as it is."""
    graph.use(node, "TensorMove")


# Every operator of a rank's graph that CPU MindSpore cannot run as it is, and how it is replaced.
REWRITES: dict[str, Callable[[Graph, pb.NodeProto, pb.PrimitiveProto], None]] = {
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
    **FUSED_REWRITES,
}
