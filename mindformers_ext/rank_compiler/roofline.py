"""What every operator of a compiled rank costs: its products, the bytes that it moves, and the least time of both.

Extends: nothing in MindFormers; MindSpore's own count of FLOPs has no grouped matmul, and counts no bytes.

`count_operators(model)` gives one `Work` for each distinct use, without a device; `compile_cell` keeps them as
`operators` of compiled.json. A closed form of a micro-batch is held against it so::

    works = [Work(**record).balanced(rows) for record in compiled["operators"]]
    repeated = [w for w in works if w.repeated]
    seconds = sum(w.seconds(profile) * w.count for w in repeated) / micro_batches
    in_memory = sum(w.bytes * w.count for w in repeated if w.kind == MEMORY) / micro_batches

`rows` is what a rank's experts get when routing is balanced: its tokens times the experts that each chooses. `profile`
is a DeviceProfile, or anything with the fields of `Rates`. Collectives are not here (`mindir.collectives`).

MindSpore's backend can add a gradient to its buffer inside the product that makes it (`joined_additions`): the flags of
graph kernels enable it, and a rank's execution order shows it. Those that it joins are counted as one product.

The counting: a kernel reads all its inputs and writes all its results once; kernels that read a part (slices, gathers)
or change a buffer in place move what they touch. Reshapes and transposed views move nothing. Products take the longer
of arithmetic and memory.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Protocol

from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir
from mindformers_ext.rank_compiler.graph_kernels import JOINED, JOINED_ELEMENTS
from mindformers_ext.rank_compiler.operators import Operator, Tensor, operators, tensors, words

PRODUCT, ATTENTION, MEMORY, VIEW = "product", "attention", "memory", "view"
UNKNOWN_ROWS = -1

MATRIX_PRODUCTS = words("MatMul BatchMatMul MatMulExt BatchMatMulExt Dense")
VIEWS = words("Reshape ExpandDims Squeeze TransposeExtView TransposeView Flatten Shape TupleToList")
# Reads as much of its first input as it writes.
READS_A_PART = words("StridedSlice SliceExt Slice Gather GatherD IndexSelect Split SplitTensor")
# Adds to or replaces a part of its first input, which is its result.
CHANGES_A_PART = words("InplaceIndexAddExt InplaceScatterSrc")
OVERWRITES = words("Assign InplaceCopy")  # its first input is not read
FUSIBLE = words(  # what graph-kernel fusion and DVM join into one kernel
    "Add AddExt Sub SubExt Mul Div RealDiv Muls Divs Neg Square Sqrt Rsqrt Reciprocal Pow Exp Log Abs Floor FloorDiv "
    "Sigmoid SigmoidGrad SiLU SiLUGrad ReLU Maximum Minimum ClampScalar Equal NotEqual Less LessEqual Greater "
    "GreaterEqual EqScalar LessScalar GreaterEqualScalar LogicalAnd LogicalOr LogicalNot Select MaskedFill Cast "
    "BroadcastTo AddN Addcmul"
)
PARTS = (  # of the model, by the cells in an operator's scope; the first that is found
    ("optimizer", r"optimizer-|clip_grad_norm-"),
    ("attention", r"self_att"),
    ("shared experts", r"shared_experts-"),
    ("router", r"gate-\w*Router|router-|balance-"),
    ("experts", r"experts-"),
    ("dispatch", r"dispatch-"),
    ("head and loss", r"lm_head-|loss-|output_layer-|cross_entropy-"),
    ("embedding", r"embed"),
    ("feed-forward", r"mlp-"),
    ("norms", r"norm-"),
    ("layers", r"layers-|mtp-"),
    ("between cells", r""),
)
ACCUMULATION = "gradient accumulation"
RESULT_TYPE, FLOAT_BYTES = "BFLOAT16", 4
PASSES_FIRST = words("Depend Load TupleGetItem")  # other inputs are waited for, or say which
PATTERNS = [(part, re.compile(pattern)) for part, pattern in PARTS]


class Rates(Protocol):
    """What a device does in a second."""

    peak_tflops: float
    matmul_efficiency: float
    attention_efficiency: float
    hbm_gb_per_s: float


@dataclass(frozen=True)
class Work:
    """One use of an operator, which a step runs `count` times."""

    operator: str
    attributes: str
    dtypes: str
    shapes: str
    part: str  # of the model
    kind: str  # PRODUCT, ATTENTION, MEMORY, or VIEW, which is no kernel
    repeated: bool  # once for each micro-batch, or more often; else once a step
    flops: float
    bytes: float
    fusion_bytes: float  # of these, what need not move when it is fused with what reads its result
    rows: int  # of a grouped product's buffer; UNKNOWN_ROWS: an axis has its length on the device, counted as 1; else 0
    row_bytes: float  # of `bytes`, those that grow with such rows
    count: int = 0

    def balanced(self, rows: float) -> "Work":
        """The same with the rows of a balanced routing, as FLOPs, bytes and what the device knows only depend on it."""
        if not self.rows:
            return self
        share = rows if self.rows == UNKNOWN_ROWS else min(1.0, rows / self.rows)
        moved = self.bytes + self.row_bytes * (share - 1)
        fused = self.fusion_bytes * (share if self.rows == UNKNOWN_ROWS else 1.0)
        return replace(self, flops=self.flops * share, bytes=moved, fusion_bytes=fused, rows=0)

    def seconds(self, rates: Rates) -> float:
        """The least time of one run."""
        shares = {PRODUCT: rates.matmul_efficiency, ATTENTION: rates.attention_efficiency}
        moved = self.bytes / (rates.hbm_gb_per_s * 1e9)
        if self.kind not in shares:
            return moved
        return max(moved, self.flops / (rates.peak_tflops * 1e12 * shares[self.kind]))


def count_operators(model: pb.ModelProto, flags: str = "") -> list[Work]:
    """Every distinct use of an operator in a step of a compiled rank; `flags` are those of graph kernels."""
    joined = joined_additions(model, flags)
    times = mindir.call_counts(model)
    several = max(times.values()) > 1
    totals: dict[Work, int] = defaultdict(int)
    saved = fusion_bytes(model)
    for function, operator in operators(model):
        place = function, operator.output
        if not times[function] or operator.name in mindir.COLLECTIVES or place in joined.values():
            continue
        part = part_of(operator)
        repeated = times[function] > 1 if several else part != "optimizer"
        rows, row_bytes = rows_of(operator)
        work = Work(
            operator.name,
            operator.attributes(),
            operator.dtypes(),
            operator.shapes(),
            ACCUMULATION if repeated and operator.name == "AssignAdd" else part,
            kind_of(operator),
            repeated,
            flops_of(operator),
            bytes_of(operator),
            saved.get(place, 0.0),
            rows,
            row_bytes,
        )
        if place in joined:  # reads and writes a float32 buffer in place of writing its result
            result = size(operator.result)
            moved = work.bytes - result + 2 * FLOAT_BYTES * result / mindir.DTYPE_BYTES[RESULT_TYPE]
            work = replace(work, operator=f"Inplace{operator.name}Add", bytes=moved, fusion_bytes=0.0)
        totals[work] += times[function]
    return [replace(work, count=count) for work, count in totals.items()]


def part_of(operator: Operator) -> str:
    """The part of the model that an operator belongs to."""
    return next(part for part, pattern in PATTERNS if pattern.search(operator.scope))


def kind_of(operator: Operator) -> str:
    """PRODUCT, ATTENTION, MEMORY or VIEW."""
    if operator.name in MATRIX_PRODUCTS or operator.name == "GroupedMatmul":
        return PRODUCT
    if operator.name.startswith("FlashAttentionScore"):
        return ATTENTION
    return VIEW if operator.name in VIEWS else MEMORY


def flops_of(operator: Operator) -> float:
    """Floating point operations of a product or attention, else 0; an axis of unknown length counts as 1."""
    kind = kind_of(operator)
    if kind == ATTENTION:
        return attention_flops(operator)
    if kind != PRODUCT:
        return 0.0
    (x, weight, *_), (result, *_) = (map(known_shape, tensors(side)) for side in (operator.inputs, operator.result))
    if operator.name == "GroupedMatmul":
        expert = weight if len(weight) == 3 else result
        return 2.0 * grouped_rows(operator) * prod(expert[1:])
    inner = sqrt(prod(x[-2:]) * prod(weight[-2:]) / prod(result[-2:]))
    return 2.0 * prod(result) * inner


def known_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(max(d, 1) for d in tensor.shape)


def grouped_rows(operator: Operator) -> int:
    """Rows of a grouped product's buffer; in the gradient of its weight they are x's second axis."""
    x, weight = tensors(operator.inputs)[:2]
    return known_shape(x)[1 if len(weight.shape) == 2 else 0]


def rows_of(operator: Operator) -> tuple[int, float]:
    """`rows` and `row_bytes` of a Work."""
    everything = operator.known()
    if any(d < 0 for t in everything for d in t.shape):
        return UNKNOWN_ROWS, bytes_of(operator) - bytes_of(operator, unknown=0)
    if operator.name != "GroupedMatmul":
        return 0, 0.0
    rows = grouped_rows(operator)
    return rows, sum(size(t) for t in everything if rows in t.shape[:2])


def attention_flops(operator: Operator) -> float:
    """Products of query, key and value: two forward, five backward; half of them where the mask is causal."""
    query, key, value = (operator.tensor(name).shape for name in ("query", "key", "value"))
    layout, heads = operator["input_layout"], operator["head_num"]
    if layout in (0, 2):  # BSH and SBH
        pairs = prod(query[:2]) * key[1 if layout == 0 else 0] * heads
        width, value_width = query[2] // heads, value[2] // heads
    else:
        axis = {1: 2, 3: 1}.get(layout, 0)  # of the sequence
        pairs, width, value_width = prod(query[:-1]) * key[axis], query[-1], value[-1]
    share = 0.5 if operator["sparse_mode"] in (2, 3) else 1.0
    widths = 3 * width + 2 * value_width if "Grad" in operator.name else width + value_width
    return 2.0 * share * pairs * widths


def size(value, unknown: int = 1) -> float:
    """Bytes of the tensors in a value; an axis of unknown length counts as `unknown`."""
    lengths = ([unknown if d < 0 else d for d in t.shape] for t in tensors(value))
    return sum(prod(d) * mindir.DTYPE_BYTES[t.dtype.upper()] for d, t in zip(lengths, tensors(value), strict=True))


def bytes_of(operator: Operator, unknown: int = 1) -> float:
    """Bytes that a kernel reads and writes."""
    if operator.name in VIEWS:
        return 0.0
    inputs, result = operator.inputs, size(operator.result, unknown)
    if operator.name == "Embedding":  # the table comes second
        return 2 * result + size(inputs[0], unknown)
    if operator.name in READS_A_PART:
        return 2 * result + size(inputs[1:], unknown)
    if operator.name in OVERWRITES:
        return result + size(inputs[1:], unknown)
    if operator.name in CHANGES_A_PART:
        source = max((size(value, unknown) for value in inputs[1:]), default=0.0)
        return 2 * source + size(inputs[1:], unknown)
    return size(inputs, unknown) + result


def joined_additions(model: pb.ModelProto, flags: str) -> dict[tuple[str, str], tuple[str, str]]:
    """{(function, product): (function, addition)} that MindSpore's backend joins.

    Its passes of these names take AssignAdd(float32 buffer, bfloat16 gradient of a weight): of a grouped product whose
    first input is transposed beside it, and of a matrix product of up to 10 million elements (MindSpore 2.9.0,
    plugin/ascend/graph_optimizer/pass/ir_fusion/).
    """
    found, enabled = {}, set(re.findall(r"\w+_fusion", flags)) & set(JOINED.values())
    if not enabled:
        return found
    names = {primitive.name: primitive.op_type for primitive in model.primitives}
    made = made_by(model)
    for function, graph in mindir.functions(model).items():
        nodes = {output: node for node in graph.node for output in node.output}
        for name, operator in made[function].items():
            if operator.name != "AssignAdd" or [t.dtype for t in operator.known()[:2]] != [
                "float",
                RESULT_TYPE.lower(),
            ]:
                continue
            value = nodes[name].input[1]
            if value in nodes and names.get(mindir.reference(nodes[value])) == "TupleGetItem":
                value = nodes[value].input[0]
            product = made[function].get(value)
            if product is not None and JOINED.get(product.name) in enabled and joins(product):
                found[function, value] = function, name
    return found


def made_by(model: pb.ModelProto) -> dict[str, dict[str, Operator]]:
    """The operator that makes each value of each function."""
    made: dict[str, dict[str, Operator]] = defaultdict(dict)
    for function, operator in operators(model):
        made[function][operator.output] = operator
    return made


def joins(product: Operator) -> bool:
    """True for a weight's gradient that takes its addition in."""
    if product.name == "MatMul":
        turns = product["transpose_a"], product["transpose_b"]
        return turns == (1, 0) and prod(tensors(product.result)[0].shape) <= JOINED_ELEMENTS
    return product["group_type"] == 2 and product.tensor("x").made_by == "TransposeExtView"


def fusion_bytes(model: pb.ModelProto) -> dict[tuple[str, str], float]:
    """{(function, value): bytes} that fusion leaves out, for each value that only kernels read which its own can join.

    Element-wise kernels join each other. A product joins the sum that accumulates its gradient.
    """
    made = made_by(model)
    names = {primitive.name: primitive.op_type for primitive in model.primitives}
    found = {}
    for function, graph in mindir.functions(model).items():
        readers = dict(_readers(graph, made[function], names))
        for name, operator in made[function].items():
            joined = FUSIBLE if operator.name in FUSIBLE else ("AssignAdd",) if kind_of(operator) == PRODUCT else ()
            if readers[name] and all(reader in joined for reader in readers[name]):
                found[function, name] = size(operator.result) * (1 + len(readers[name]))
    return found


def _readers(graph: pb.GraphProto, made: dict[str, Operator], names: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """(value, operators that read it), through views and what passes values on; one that leaves is read by ""."""
    passed: dict[str, list[str]] = defaultdict(list)  # value: the values that it becomes
    read: dict[str, list[str]] = defaultdict(list)
    for output in graph.output:
        read[output.name].append("")
    for node in graph.node:
        name = names.get(mindir.reference(node), "")
        operator = made.get(node.output[0])
        if name in PASSES_FIRST or name in VIEWS:
            passed[node.input[0]].append(node.output[0])
        elif name == "MakeTuple":
            for value in node.input:
                passed[value].append(node.output[0])
        elif name != "UpdateState":
            for value in node.input:
                read[value].append(operator.name if operator else "")

    def readers(value: str) -> list[str]:
        return read[value] + [reader for after in passed[value] for reader in readers(after)]

    for value in made:
        yield value, readers(value)
