"""Read a rank's compiled graph (MindIR): its parameters as stored on the rank, and every collective it runs in a step.

Extends: nothing in MindFormers; MindSpore 2.9.0 writes this protobuf but has no reader for people.
With `lazy_inline` the graph holds each repeated cell once, as a function, and calls it through closures (the backward
pass of a cell is a closure that its forward call returns). `call_counts` follows those calls symbolically, so a
collective inside a function counts as often as the function runs.
"""

import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from mindformers_ext.rank_compiler import mind_ir as pb

COLLECTIVES = {"AllReduce", "AllGather", "ReduceScatter", "AlltoAll", "AlltoAllV", "Broadcast", "Send", "Receive"}
GENERATED_SUFFIX = re.compile(r"_\d{6,}$")
NUMBER_FORMATS = {pb.TensorProto.FLOAT: "<f", pb.TensorProto.INT32: "<i", pb.TensorProto.INT64: "<q"}
PASS_THROUGH = {"Depend", "Load", "UpdateState"}  # their first input is their value
WORLD_GROUP = "hccl_world_group"
DTYPE_BYTES = {
    name: size
    for size, names in {
        1: "BOOL INT8 UINT8 STRING",
        2: "FLOAT16 BFLOAT16 INT16 UINT16",
        4: "FLOAT INT32 UINT32",
        8: "DOUBLE INT64 UINT64 COMPLEX64",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Collective:
    """One kind of communication of a rank: the same operator, group, tensor and purpose, `count` times a step."""

    kind: str
    ranks: tuple[int, ...]  # global ranks of the group; for Send and Receive: this rank and its peer
    purpose: str  # the compiler's name for it ("" when it has none)
    dtype: str
    bytes: int | None  # of the whole tensor (gathered, or to be scattered); None where the shape is dynamic
    count: int


@dataclass(frozen=True)
class Closure:
    """A function with its first arguments bound."""

    function: str
    bound: tuple = ()


@dataclass(frozen=True)
class Bundle:
    """A tuple that holds at least one closure."""

    elements: tuple


@dataclass(frozen=True)
class Choice:
    """The value of a Switch: either branch may be called."""

    branches: tuple


def load_model(graph: bytes) -> pb.ModelProto:
    """Parse MindIR bytes."""
    model = pb.ModelProto()
    model.ParseFromString(graph)
    return model


def functions(model: pb.ModelProto) -> dict[str, pb.GraphProto]:
    """The main graph and all others, by name."""
    return {graph.name: graph for graph in [model.graph, *model.functions]}


def reference(node: pb.NodeProto) -> str:
    """What a node applies: a primitive, a function or another node's output; "" for built-in kinds."""
    return node.op_type.removeprefix("REF::") if node.op_type.startswith("REF::") else ""


def plain(attribute: pb.AttributeProto) -> Any:
    """A number or text, or a list of what a tuple or tensor holds; None also for what is none of these."""
    kinds = pb.AttributeProto
    if attribute.type == kinds.STRING:
        return attribute.s.decode()
    if attribute.type in (kinds.TUPLE, kinds.LIST):
        return [plain(value) for value in attribute.values]
    if attribute.type == kinds.FLOAT:
        return attribute.f
    if attribute.tensors:
        form = NUMBER_FORMATS.get(attribute.tensors[0].data_type)
        return [number for (number,) in struct.iter_unpack(form, attribute.tensors[0].raw_data)] if form else None
    if attribute.type == kinds.NONE:
        return None
    return attribute.ints[0] if attribute.ints else attribute.i


def attributes_of(primitive: pb.PrimitiveProto) -> dict[str, Any]:
    """The attributes of a primitive as plain values."""
    return {attribute.name: plain(attribute) for attribute in primitive.attribute}


def attribute(node: pb.NodeProto, name: str) -> pb.AttributeProto | None:
    """A node's attribute: "shape", "value"."""
    return next((found for found in node.attribute if found.name == name), None)


def constants(model: pb.ModelProto) -> dict[str, pb.NodeProto]:
    """The nodes of all constants, by their value's name: each is written once, in the first function that uses it."""
    parts = functions(model).values()
    return {node.output[0]: node for part in parts for node in part.node if node.op_type == "Constant"}


def constant(node: pb.NodeProto) -> Any:
    """The plain value of a constant's node."""
    return plain(attribute(node, "value"))


def stored_parameters(model: pb.ModelProto) -> dict[str, dict[str, Any]]:
    """{name: {shape, dtype, bytes}} of every parameter, as this rank stores it after all kinds of sharding."""
    found = {}
    for tensor in model.graph.parameter:
        dtype = pb.TensorProto.DataType.Name(tensor.data_type)
        shape = list(tensor.dims)
        name = tensor.name.split(":", 1)[-1]  # MindIR puts the graph's name in front
        found[name] = {"shape": shape, "dtype": dtype.lower(), "bytes": prod(shape) * DTYPE_BYTES[dtype]}
    return found


def correct_groups(model: pb.ModelProto, ranks_of: Callable[[str], list[int]]) -> bool:
    """Make `group_rank_ids` of every collective the ranks of its group; True when any was wrong.

    The compiler knows the members of its own groups only: for one that the model made (expert parallelism) it may
    write all ranks of the cluster. `rank_size`, the number of members, is right; AllReduce and AlltoAllV have none.
    """
    wrong = False
    for primitive in model.primitives:
        attributes = {a.name: a for a in primitive.attribute}
        if primitive.op_type not in COLLECTIVES or not {"group", "group_rank_ids"} <= attributes.keys():
            continue
        ranks, group = attributes["group_rank_ids"].values, attributes["group"].s.decode()
        size = attributes.get("rank_size")
        if group == WORLD_GROUP or size is not None and len(ranks) == size.i:
            continue
        members = ranks_of(group)
        if [value.ints[0] for value in ranks] != members:
            del ranks[len(members) :]
            for value, member in zip(ranks, members, strict=True):
                value.ints[0] = member
            wrong = True
    return wrong


def collectives(
    model: pb.ModelProto, rank: int, world_size: int, counts: Counter[str] | None = None
) -> list[Collective]:
    """Every collective that `rank` runs in one step, equal ones summed, in order of first appearance.

    `counts` says how often each function runs, in place of `call_counts`.
    """
    primitives = {p.name: p for p in model.primitives}
    totals: Counter[Collective] = Counter()
    for function, times in (counts or call_counts(model)).items():
        for node in functions(model)[function].node:
            primitive = primitives.get(reference(node))
            if primitive is not None and primitive.op_type in COLLECTIVES:
                totals[_describe(node, primitive, rank, world_size)] += times
    return [Collective(**(asdict(key) | {"ranks": key.ranks, "count": count})) for key, count in totals.items()]


def call_counts(model: pb.ModelProto) -> Counter[str]:
    """How often each function of the model runs in one call of the main graph (which counts as one)."""
    return _Counting(model).run()


class _Counting:
    """Symbolic evaluation: only closures are tracked, every tensor is None; equal calls are evaluated once."""

    def __init__(self, model: pb.ModelProto):
        self.main = model.graph.name
        self.functions = functions(model)
        self.operators = {p.name: p.op_type for p in model.primitives}
        self.constants = constants(model)
        self.seen: dict[Closure, tuple[Any, Counter[str]]] = {}

    def run(self) -> Counter[str]:
        return self._call(Closure(self.main, (None,) * len(self.functions[self.main].input)))[1]

    def _call(self, closure: Closure) -> tuple[Any, Counter[str]]:
        if closure not in self.seen:
            graph = self.functions[closure.function]
            values = dict(zip((i.name for i in graph.input), closure.bound, strict=False))
            counts = Counter({closure.function: 1})
            for node in graph.node:
                values[node.output[0]] = self._node(node, values, counts)
            name = graph.output[0].name
            self.seen[closure] = (self._value(name, values), counts)
        return self.seen[closure]

    def _value(self, name: str, values: dict[str, Any]) -> Any:
        if name in values:
            return values[name]
        return Closure(name) if name in self.functions else None

    def _node(self, node: pb.NodeProto, values: dict[str, Any], counts: Counter[str]) -> Any:
        inputs = tuple(self._value(name, values) for name in node.input)
        applied = reference(node)
        operator = self.operators.get(applied, node.op_type)
        if operator == "Partial":
            return Closure(inputs[0].function, inputs[0].bound + inputs[1:])
        if operator == "MakeTuple":
            return Bundle(inputs) if any(i is not None for i in inputs) else None
        if operator == "TupleGetItem" and isinstance(inputs[0], Bundle):
            return inputs[0].elements[constant(self.constants[node.input[1]])]
        if operator == "Switch":
            return Choice(tuple(i for i in inputs[1:] if i is not None)) or None
        if operator in PASS_THROUGH:
            return inputs[0]
        called = self._value(applied, values) if applied else None
        branches = called.branches if isinstance(called, Choice) else (called,)
        results = [self._call(Closure(b.function, b.bound + inputs)) for b in branches if isinstance(b, Closure)]
        for _, inner in results:
            counts.update(inner)
        return results[0][0] if results else None


def _describe(node: pb.NodeProto, primitive: pb.PrimitiveProto, rank: int, world_size: int) -> Collective:
    attributes = attributes_of(primitive)
    ranks = tuple(attributes.get("group_rank_ids", range(world_size)))
    kind = primitive.op_type
    if kind in ("Send", "Receive"):
        peer = ranks[attributes["dest_rank" if kind == "Send" else "src_rank"]]
        ranks = tuple(sorted((rank, peer)))
    tensors = attribute(node, "shape").tensors
    sizes = [_tensor_bytes(t) for t in tensors]
    total = None if None in sizes else sum(sizes)
    if kind == "ReduceScatter" and total is not None:
        total *= len(ranks)  # the node's shape is the scattered part
    dtype = pb.TensorProto.DataType.Name(tensors[0].data_type).lower() if tensors else "unknown"
    purpose = GENERATED_SUFFIX.sub("", primitive.instance_name)
    return Collective(kind, ranks, purpose, dtype, total, 1)


def _tensor_bytes(tensor: pb.TensorProto) -> int | None:
    if any(d < 0 for d in tensor.dims):
        return None
    return prod(tensor.dims) * DTYPE_BYTES[pb.TensorProto.DataType.Name(tensor.data_type)]
