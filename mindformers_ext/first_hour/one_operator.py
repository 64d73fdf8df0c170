"""One operator of a rank's graph as a graph of its own, with inputs that its documents allow.

Extends: nothing in MindFormers. The backward pass is in a rank's graph too, so its operators are cut out like others.
On CPU the small graph is lowered as the rank's would be (lowering/lower.py), and runs our kernels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.lowering.lower import lower
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir
from mindformers_ext.rank_compiler.operators import NAMES, Operator, Tensor, operators, tensors
from mindformers_ext.rank_compiler.roofline import VIEW, kind_of

NUMPY = {"float": np.float32, "float16": np.float16, "bfloat16": np.float32, "double": np.float64, "bool": np.bool_}
# Changes a buffer in place, draws random numbers, or reads a register: nothing to compare with one call.
NOT_ALONE = ("Assign", "AssignAdd", "ApplyAdamW", "AdamW", "InplaceIndexAddExt", "InplaceScatterSrc", "InplaceCopy")
NOT_ALONE += ("NPUGetFloatStatusV2", "NPUClearFloatStatusV2", "DropoutExt", "DropoutGenMask", "MoveTo")
NOT_ALONE += ("Addcmul",)
POSITIVE = ("Sqrt", "Rsqrt", "Reciprocal", "Log", "Pow", "Div", "RealDiv", "Divs", "FloorDiv")
STATISTICS = {"softmax_max": 0, "softmax_sum": 1, "attention_in": 3}  # inputs of a gradient, results of its forward
TRANSPOSED = "TransposeExtView"


@dataclass(frozen=True)
class Use:
    """A distinct use of an operator in a compiled graph."""

    graph: Path
    function: str
    operator: Operator

    @property
    def name(self) -> str:
        return f"{self.operator.name} {self.operator.attributes()}".strip()

    @property
    def identity(self) -> str:
        """Equal for equal uses in any graph."""
        return " | ".join((self.name, self.operator.dtypes(), self.operator.shapes()))


def distinct_uses(graphs: Iterable[Path]) -> list[Use]:
    """Every use that can be tried alone, equal ones once, in the order of the graphs."""
    found: dict[str, Use] = {}
    for path in graphs:
        model = mindir.load_model(path.read_bytes())
        times = mindir.call_counts(model)
        for function, operator in operators(model):
            use = Use(path, function, operator)
            if times[function] and can_run_alone(operator):
                found.setdefault(use.identity, use)
    return list(found.values())


def can_run_alone(operator: Operator) -> bool:
    """False for communication, views, what works in place, and what has shapes that only a device knows."""
    if operator.name in mindir.COLLECTIVES or operator.name in NOT_ALONE or kind_of(operator) == VIEW:
        return False
    shapes = [t.shape for t in operator.known()]
    return bool(tensors(operator.result)) and not any(d < 0 for shape in shapes for d in shape)


class Source:
    """A compiled graph to cut operators out of, looked through once."""

    def __init__(self, model: pb.ModelProto):
        self.model = model
        self.constants = mindir.constants(model)
        self.primitives = {primitive.name: primitive for primitive in model.primitives}
        self.made: dict[str, dict[str, pb.NodeProto]] = {}
        self.types: dict[str, dict[str, Tensor]] = {}
        for name, graph in mindir.functions(model).items():
            self.made[name] = {node.output[0]: node for node in graph.node}
            self.types[name] = dict(_types(model, graph))


def cut_out(source: Source, function: str, output: str) -> pb.ModelProto:
    """The model of one node: tensors that it takes are inputs in the order of use, constants stay constants."""
    model, constants, primitives = source.model, source.constants, source.primitives
    made, types = source.made[function], source.types[function]
    found = pb.ModelProto(
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        model_version=model.model_version,
        little_endian=model.little_endian,
        mind_ir_version=model.mind_ir_version,
    )
    found.graph.name = "one_operator"

    def operator_of(node: pb.NodeProto | None) -> str:
        primitive = primitives.get(mindir.reference(node)) if node is not None else None
        return primitive.op_type if primitive else ""

    def take(value: str) -> None:
        """Have `value` in the new graph."""
        if value in done:
            return
        done.add(value)
        node = made.get(value)
        if value in constants:
            found.graph.node.add().CopyFrom(constants[value])
        elif operator_of(node) in ("MakeTuple", TRANSPOSED) or value == output:
            for inner in node.input:
                take(inner)
            copied = found.graph.node.add()
            copied.CopyFrom(node)
            del copied.node_attr[:], copied.primal_attr[:]
            copied.domain = "Default"
            if mindir.reference(node) not in {p.name for p in found.primitives}:
                found.primitives.add().CopyFrom(primitives[mindir.reference(node)])
        elif value in types:
            tensor = types[value]
            given = found.graph.input.add(name=value).tensor.add(dims=tensor.shape)
            given.data_type = pb.TensorProto.DataType.Value(tensor.dtype.upper())

    done: set[str] = set()
    take(output)
    for primitive in found.primitives:  # of a cluster that is not here
        kept = [
            a for a in primitive.attribute if a.name not in ("in_strategy", "out_strategy", "in_layout", "out_layout")
        ]
        del primitive.attribute[:]
        primitive.attribute.extend(kept)
    found.graph.output.add(name=output)
    return found


def _types(model: pb.ModelProto, graph: pb.GraphProto) -> Iterator[tuple[str, Tensor]]:
    """Type and shape of every value that a function can use."""
    for parameter in model.graph.parameter:
        yield parameter.name, _tensor(parameter)
    for given in graph.input:
        if given.tensor:
            yield given.name, _tensor(given.tensor[0])
    for node in graph.node:
        shape = mindir.attribute(node, "shape")
        if shape is not None and shape.tensors:
            yield node.output[0], _tensor(shape.tensors[0])


def _tensor(tensor: pb.TensorProto) -> Tensor:
    return Tensor(pb.TensorProto.DataType.Name(tensor.data_type).lower(), tuple(tensor.dims))


def in_float32(model: pb.ModelProto) -> pb.ModelProto:
    """The same with float32 in place of bfloat16 and float16, as a reference."""
    model = copy.deepcopy(model)
    low = (pb.TensorProto.BFLOAT16, pb.TensorProto.FLOAT16)

    def widen(attribute: pb.AttributeProto) -> None:
        for tensor in attribute.tensors:
            if tensor.data_type in low and not tensor.raw_data:
                tensor.data_type = pb.TensorProto.FLOAT
        for value in attribute.values:
            widen(value)

    for given in model.graph.input:
        if given.tensor[0].data_type in low:
            given.tensor[0].data_type = pb.TensorProto.FLOAT
    for node in model.graph.node:
        for attribute in node.attribute:
            widen(attribute)
    return model


def as_cell(model: pb.ModelProto, path: Path, on_cpu: bool):
    """The model as a cell that runs on this process's device; `path` is a file to write."""
    import mindspore as ms
    from mindspore import nn

    if on_cpu:
        _name_shapes(model)
        lower(model, 0, 1)
    path.write_bytes(model.SerializeToString())
    return nn.GraphCell(ms.load(str(path)))


def _name_shapes(model: pb.ModelProto) -> None:
    """Let a node that does nothing stand behind every input: the lowering reads shapes of nodes."""
    primitive = model.primitives.add(name="Depend:given", op_type="Depend", prim_type=pb.PrimitiveProto.PRIMITIVE)
    nodes = []
    for given in model.graph.input:
        value = given.name
        given.name = f"{value}/given"
        node = pb.NodeProto(name=value, input=[given.name] * 2, output=[value], op_type=f"REF::{primitive.name}")
        tensor = pb.TensorProto(dims=given.tensor[0].dims, data_type=given.tensor[0].data_type)
        node.attribute.add(name="shape", type=pb.AttributeProto.TENSORS, tensors=[tensor])
        nodes.append(node)
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def input_arrays(use: Use, model: pb.ModelProto, seed: int) -> list[np.ndarray | None]:
    """Values for the inputs of a cut out model, the same for the same seed; None for what the forward pass must give.

    Floats are those that bfloat16 holds, so that every type starts from the same numbers.
    """
    rng = np.random.default_rng(seed)
    roles = roles_of(use.operator, model)
    return [
        _array(use.operator, roles.get(given.name, ""), _tensor(given.tensor[0]), rng) for given in model.graph.input
    ]


def roles_of(operator: Operator, model: pb.ModelProto) -> dict[str, str]:
    """{graph input: the operator's name for it}, through tuples and transposes."""
    made = {node.output[0]: node for node in model.graph.node if node.op_type != "Constant"}
    node = made[model.graph.output[0].name]

    def sources(value: str) -> list[str]:
        return [s for inner in made[value].input for s in sources(inner)] if value in made else [value]

    names = NAMES.get(operator.name, ())
    return {
        source: names[index] if index < len(names) else "x"
        for index, value in enumerate(node.input)
        for source in sources(value)
    }


def _array(operator: Operator, role: str, tensor: Tensor, rng: np.random.Generator) -> np.ndarray | None:
    shape, kind = tensor.shape, tensor.dtype
    if operator.name.endswith("Grad") and role in STATISTICS and operator.name.startswith("Flash"):
        return None
    maker = ROLES.get((operator.name, role)) or ROLES.get(("", role))
    if maker is not None:
        return maker(operator, shape, rng).astype(NUMPY.get(kind, kind))
    if kind in ("float", "float16", "bfloat16", "double"):
        values = rng.standard_normal(shape, np.float32)
        if operator.name in POSITIVE:
            values = np.abs(values) + 0.5
        return bfloat16_values(values).astype(NUMPY[kind])
    if kind == "bool":
        return rng.random(shape) < 0.5
    return rng.integers(0, smallest_axis(operator), shape).astype(kind)


def smallest_axis(operator: Operator) -> int:
    """Whatever axis an index is of, numbers below this are on it."""
    return max(1, min((d for t in tensors(operator.inputs[:1]) for d in t.shape), default=2))


def bfloat16_values(values: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the nearest that bfloat16 holds."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def permutation(operator: Operator, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(int(np.prod(shape))).reshape(shape)


def group_ends(operator: Operator, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Groups of equal size that take all rows."""
    x, weight = tensors(operator.inputs)[:2]
    rows = x.shape[1] if len(weight.shape) == 2 else x.shape[0]
    return rows * np.arange(1, shape[0] + 1) // shape[0]


def inverse_deviation(operator: Operator, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return bfloat16_values(rng.random(shape, np.float32) + 0.5)


ROLES: dict[tuple[str, str], Callable] = {
    ("", "sorted_indices"): permutation,
    ("MoeTokenPermute", "indices"): lambda operator, shape, rng: rng.integers(0, 64, shape),
    ("", "group_list"): group_ends,
    ("", "rstd"): inverse_deviation,
    ("", "attn_mask"): lambda operator, shape, rng: np.triu(np.ones(shape), 1),
}
