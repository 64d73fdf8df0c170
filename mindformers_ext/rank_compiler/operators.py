"""The operators of a rank's graph (MindIR) with the types, shapes and constants that they are called with.

Extends: nothing in MindFormers; mindir.py reads the parts, this file gives an operator's inputs their names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir


def words(text: str) -> tuple[str, ...]:
    """The words of a list that is written as text."""
    return tuple(text.split())


FLASH_NUMBERS = words("head_num keep_prob scale_value pre_tokens next_tokens inner_precise input_layout sparse_mode")
# Inputs in MindIR's order: a primitive's signature, then its arguments (ops/auto_generate/gen_ops_prim.py of 2.9.0).
NAMES = {
    "FlashAttentionScore": words(
        "query key value real_shift drop_mask padding_mask attn_mask prefix actual_seq_qlen actual_seq_kvlen"
    )
    + FLASH_NUMBERS,
    "FlashAttentionScoreGrad": words(
        "query key value dy pse_shift drop_mask padding_mask attn_mask softmax_max softmax_sum softmax_in attention_in "
        "prefix actual_seq_qlen actual_seq_kvlen"
    )
    + FLASH_NUMBERS,
    "RotaryPositionEmbedding": words("x cos sin mode"),
    "RotaryPositionEmbeddingGrad": words("dy cos sin x mode"),  # the wheel calls the fourth dx
    "GroupedMatmul": words(
        "x weight bias scale offset antiquant_scale antiquant_offset group_list split_item group_type transpose_a "
        "transpose_b"
    ),
    "MoeTokenPermute": words("tokens indices num_out_tokens padded_mode"),
    "MoeTokenPermuteGrad": words("permuted_tokens_grad sorted_indices num_topk padded_mode"),
    "InnerMoeTokenUnpermute": words("permuted_tokens sorted_indices probs padded_mode restore_shape"),
    "MoeTokenUnpermuteGrad": words(
        "permuted_tokens unpermuted_tokens_grad sorted_indices probs padded_mode restore_shape"
    ),
    "RmsNorm": words("x gamma epsilon"),
    "RmsNormGrad": words("dy x rstd gamma"),
    "Swiglu": words("input dim"),
    "SwigluGrad": words("grad_output input dim"),
    "ApplyAdamW": words(
        "var m v beta1_power beta2_power lr weight_decay beta1 beta2 epsilon grad max_grad_norm amsgrad maximize"
    ),
    "AdamW": words("var m v max_v gradient step lr beta1 beta2 decay eps amsgrad maximize"),
    "MatMul": words("input mat2 transpose_a transpose_b"),
    "BatchMatMul": words("x y transpose_a transpose_b"),
}
LAYOUTS = {0: "BSH", 1: "BNSD", 2: "SBH", 3: "BSND", 4: "TND", 5: "TH"}  # MindSpore's numbers of input_layout
SHOWN = words("input_layout sparse_mode mode split_item group_type transpose_a transpose_b padded_mode dim")
# What passes values on, or is no operator.
STRUCTURE = {
    "Constant",
    "Depend",
    "Load",
    "UpdateState",
    "MakeTuple",
    "TensorToTuple",
    "TupleGetItem",
    "Partial",
    "Switch",
}


UNKNOWN_RANK = -2  # in MindSpore's shapes


class Undecided(Exception):
    """The graph does not say what a rule asks for."""


class DynamicShape(tuple):
    """A shape with axes that only the device knows (below 0): its rank and its other axes can be asked for.

    Raises Undecided for any other question.
    """

    def __getitem__(self, index: int | slice) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            return DynamicShape(found)
        if found < 0:
            raise Undecided(f"axis {index} is known on the device only")
        return found

    def __iter__(self) -> Iterator[int]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self))


@dataclass(frozen=True)
class Tensor:
    """Type and shape of a value; an axis below 0 is known on the device only."""

    dtype: str
    shape: tuple[int, ...]
    made_by: str = ""  # operator

    def __str__(self) -> str:
        return str(self.shape)


class Unknown:
    """A value whose type MindIR does not hold."""


UNKNOWN = Unknown()


@dataclass(frozen=True)
class Operator:
    """One use of an operator: inputs and results are Tensors, tuples of them, plain constants, or UNKNOWN."""

    name: str
    scope: str  # names and classes of the cells around it
    inputs: tuple
    result: Any
    output: str = ""  # name of the result in its function

    @property
    def results(self) -> tuple:
        return self.result if isinstance(self.result, tuple) else (self.result,)

    def value(self, name: str) -> Any:
        """The input of this name. Raises Undecided."""
        index = NAMES[self.name].index(name)
        if index >= len(self.inputs) or self.inputs[index] is UNKNOWN:
            raise Undecided(f"{name} of {self.name} is not known")
        return self.inputs[index]

    def __getitem__(self, name: str) -> Any:
        """A constant input. Raises Undecided."""
        value = self.value(name)
        if isinstance(value, Tensor):
            raise Undecided(f"{name} of {self.name} is computed")
        return value

    def tensor(self, name: str, optional: bool = False) -> Tensor | None:
        """A tensor input of known rank; a tuple of one counts as it. Raises Undecided, its unknown axes later."""
        value = self.value(name)
        if isinstance(value, tuple) and len(value) == 1:
            value = value[0]
        if value is None and optional:
            return None
        if not isinstance(value, Tensor) or UNKNOWN_RANK in value.shape:
            raise Undecided(f"the shape of {name} of {self.name} is not known")
        return replace(value, shape=DynamicShape(value.shape)) if min(value.shape, default=0) < 0 else value

    def known(self) -> list[Tensor]:
        """All its tensors."""
        return tensors((self.inputs, self.result))

    def attributes(self) -> str:
        """The constants that choose what it computes, "mode=1"."""
        named = zip(NAMES.get(self.name, ()), self.inputs, strict=False)
        shown = {name: value for name, value in named if name in SHOWN and isinstance(value, int)}
        if "input_layout" in shown:
            shown["input_layout"] = LAYOUTS.get(shown["input_layout"], shown["input_layout"])
        return " ".join(f"{name}={value}" for name, value in shown.items())

    def dtypes(self) -> str:
        """'bfloat16, float -> bfloat16'; a tuple shows the types in it once."""
        return self._each(lambda value: "/".join(dict.fromkeys(t.dtype for t in tensors(value))))

    def shapes(self) -> str:
        """'(4, 8), (8, 2) -> (4, 2)'."""
        return self._each(lambda value: " ".join(map(str, tensors(value)[:8])))

    def _each(self, show) -> str:
        sides = (", ".join(filter(None, map(show, values))) for values in (self.inputs, self.results))
        return " -> ".join(sides)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def operators(model: pb.ModelProto) -> Iterator[tuple[str, Operator]]:
    """Every operator of every function of the model, with the function's name."""
    names = {primitive.name: primitive.op_type for primitive in model.primitives}
    constants = {name: _constant(node) for name, node in mindir.constants(model).items()}
    parameters = {parameter.name: _tensor(parameter) for parameter in model.graph.parameter}
    values = constants | parameters  # names are unique in the whole model
    for function, graph in mindir.functions(model).items():
        values |= {i.name: _tensor(i.tensor[0]) if i.tensor else UNKNOWN for i in graph.input}
        for node in graph.node:
            if node.op_type == "Constant":
                continue
            name = names.get(mindir.reference(node), "")
            inputs = tuple(values.get(text, UNKNOWN) for text in node.input)
            result = inputs if name == "MakeTuple" else _typed(mindir.attribute(node, "shape"), name)
            values[node.output[0]] = result
            if name and name not in STRUCTURE:
                yield function, Operator(name, node.domain, inputs, result, node.output[0])


def _tensor(tensor: pb.TensorProto, made_by: str = "") -> Tensor:
    return Tensor(pb.TensorProto.DataType.Name(tensor.data_type).lower(), tuple(tensor.dims), made_by)


def _typed(shape: pb.AttributeProto | None, made_by: str) -> Any:
    """What a node's attribute "shape" says of its result."""
    if shape is not None and shape.type == pb.AttributeProto.TUPLE:
        return tuple(_typed(value, made_by) for value in shape.values)
    return _tensor(shape.tensors[0], made_by) if shape is not None and shape.tensors else UNKNOWN


def _constant(node: pb.NodeProto) -> Any:
    value = mindir.attribute(node, "value")
    if value is None:
        return UNKNOWN
    if value.tensors:
        return _tensor(value.tensors[0])
    return _frozen(mindir.plain(value))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
