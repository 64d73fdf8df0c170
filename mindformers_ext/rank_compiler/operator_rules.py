"""What CANN's documents demand of the operators of a rank's graph, for Atlas A2 and A3: a table, and who breaks it.

Extends: nothing in MindFormers; the compiler of MindSpore 2.9.0 checks shapes, not what the card's kernels document.
A row that a graph cannot decide (lengths that only data have) is not here. What the plugin has kernels for was read in
the names of the kernel classes of the wheel's libmindspore_ops_ascend.so.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path

from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir
from mindformers_ext.rank_compiler.operators import LAYOUTS, NAMES, Operator, Undecided, operators, words

VIOLATION, DOUBTFUL, DOCUMENTED = "violation", "doubtful", "documented"  # the gravest first
# Mirrors of CANN's repositories, each document at a commit that has it.
TRANSFORMER, NN = "https://github.com/hicann/ops-transformer/blob", "https://github.com/hicann/ops-nn/blob"
FLASH = f"{TRANSFORMER}/60266d1/attention/flash_attention_score/docs/aclnnFlashAttentionScore.md"
ROTARY = f"{TRANSFORMER}/04193ab/posembedding/rotary_position_embedding/docs/aclnnRotaryPositionEmbedding.md"
TURN_BACK = f"{TRANSFORMER}/7a0d19c/posembedding/rotary_position_embedding_grad/docs"
ROTARY_GRAD = f"{TURN_BACK}/aclnnRotaryPositionEmbeddingGrad.md"
GROUPED = f"{TRANSFORMER}/827a604/gmm/grouped_matmul/docs/aclnnGroupedMatmulV4_en.md"
PERMUTE = f"{TRANSFORMER}/3d069c6/moe/moe_token_permute/docs/aclnnMoeTokenPermute.md"
UNPERMUTE = f"{TRANSFORMER}/60266d1/moe/moe_token_unpermute/docs/aclnnMoeTokenUnpermute.md"
NORM_GRAD = f"{NN}/2ed368e/norm/rms_norm_grad/docs/aclnnRmsNormGrad.md"
SWIGLU = f"{NN}/e7b7498/activation/swi_glu/docs/aclnnSwiGlu.md"
ADAMW = f"{NN}/14960a6/optim/apply_adam_w/docs/aclnnApplyAdamW.md"
WHEEL = "mindspore 2.9.0, ops/auto_generate/gen_ops_prim.py"
GROUPED_WHEEL = "mindspore 2.9.0, ops/auto_generate/gen_ops_def.py"
PLUGIN = "mindspore 2.9.0, lib/plugin/libmindspore_ops_ascend.so (kernel classes)"
ALL_RANKS = "the column of dimensions in every operator's document"

FLOATS = ("float16", "bfloat16", "float")
MASKS = ("uint8", "bool")
PLACES = 8
CAUSAL, CAUSAL_TO_LAST, BAND = COMPRESSED = (2, 3, 4)  # sparse modes whose mask is the triangle
TRIANGLE = (2048, 2048)
HALF, INTERLEAVED = 0, 1  # modes of RotaryPositionEmbedding
NORM_TYPES = {("bfloat16", "bfloat16"), ("bfloat16", "float"), ("float16", "float16"), ("float16", "float")} | {
    ("float", "float")
}
VECTOR_CORES = 48  # of the largest A2 card
ROWS_LIMIT = 16_777_215


@dataclass(frozen=True)
class Rule:
    """One row: what an operator must be, as a predicate over its use in a graph."""

    operators: str  # names
    demand: str
    document: str
    holds: Callable[[Operator], bool]
    verdict: str = VIOLATION  # of a use that does not hold
    remedy: str = ""  # for a doubtful one: the documented replacement, or why it stays


@dataclass(frozen=True)
class Finding:
    """Equal uses of an operator, and what the table says of them."""

    operator: str
    attributes: str
    dtypes: str
    verdict: str
    demand: str
    document: str
    remedy: str
    count: int  # in one step
    shapes: str  # of the first use
    places: list[str] = field(default_factory=list)  # the model's lines, or scopes without one; the first PLACES
    in_mindformers: bool = False  # MindFormers' own graph has the operator with these attributes and types


def audit(model: pb.ModelProto, lines: dict[str, str] | None = None, deterministic: bool = False) -> list[Finding]:
    """Everything that a compiled rank runs, with its verdict, the gravest first.

    `lines` gives the model's line of a cell's class. `deterministic` says that context.deterministic is ON.
    """
    found: dict[tuple, Finding] = {}
    for operator, count, scopes in distinct_uses(model):
        places = dict.fromkeys(place_of(scope, lines or {}) for scope in scopes)
        for verdict, demand, document, remedy in judged(operator, deterministic):
            key = (operator.name, operator.attributes(), operator.dtypes(), verdict, demand)
            known = found.setdefault(
                key,
                Finding(
                    *key, document, remedy, 0, operator.shapes(), in_mindformers=key[:3] in mindformers_signatures()
                ),
            )
            known.places.extend([place for place in places if place not in known.places][: PLACES - len(known.places)])
            found[key] = replace(known, count=known.count + count)
    order = (VIOLATION, DOUBTFUL, DOCUMENTED)
    return sorted(found.values(), key=lambda f: (order.index(f.verdict), f.operator, -f.count))


@cache
def mindformers_signatures() -> frozenset[tuple[str, ...]]:
    """(operator, attributes, types) of all that MindFormers' own DeepSeek-V3 runs; the file says how it was made."""
    lines = (Path(__file__).parent / "mindformers_signatures.tsv").read_text().splitlines()
    return frozenset(tuple(line.split("\t")) for line in lines if not line.startswith("#"))


def distinct_uses(model: pb.ModelProto) -> Iterator[tuple[Operator, int, list[str]]]:
    """Every use of an operator that differs in inputs or result from the others, how often it runs, and its scopes."""
    uses: dict[tuple, list] = {}
    times = mindir.call_counts(model)
    for function, operator in operators(model):
        if times[function]:
            use = uses.setdefault((operator.name, operator.inputs, operator.result), [operator, 0, []])
            use[1] += times[function]
            use[2].append(operator.scope)
    yield from map(tuple, uses.values())


def judged(operator: Operator, deterministic: bool) -> Iterator[tuple[str, str, str, str]]:
    """(verdict, demand, document, remedy) of every rule that a use breaks, or one that says it is documented."""
    rules = [rule for rule in RULES if rule.operators == "*" or operator.name in rule.operators.split()]
    if deterministic:
        rules = [rule for rule in rules if rule.demand != DETERMINISTIC]
    whole = True
    for rule in rules:
        try:
            broken, verdict = not rule.holds(operator), rule.verdict
        except Undecided as reason:
            broken, verdict = True, DOUBTFUL
            rule = replace(rule, remedy=f"the graph does not say: {reason}")
        if broken:
            whole = False
            yield verdict, rule.demand, rule.document, rule.remedy
    known = len(rules) > 1 or operator.name in HAVE_KERNELS or operator.name in mindir.COLLECTIVES
    if whole and known:
        yield DOCUMENTED, "", next((r.document for r in rules if r.operators != "*"), PLUGIN), ""
    elif whole:
        yield DOUBTFUL, "is not in the table of operators", "", "look it up and write its row (operator_rules.py)"


def place_of(scope: str, lines: dict[str, str]) -> str:
    """The model's line of the innermost cell in a scope "…/0-DecoderLayer/…/q_proj-Linear/MatMul-op1", or the scope."""
    cells = [part.partition("-")[2] for part in scope.split("/")[:-1]]
    known = [f"{lines[cell]} ({cell})" for cell in cells if cell in lines]
    return known[-1] if known else scope or "made by the compiler"


# --- predicates ---


def one_type(operator: Operator, *names: str, of: tuple[str, ...] = FLOATS) -> bool:
    types = {operator.tensor(name).dtype for name in names}
    return len(types) == 1 and types <= set(of)


def attention_sizes(operator: Operator, name: str) -> tuple[int, int, int, int]:
    """(B, N, S, D) of query, key or value; B and S of packed layouts are 1 and all tokens."""
    shape = operator.tensor(name).shape
    layout, heads = LAYOUTS.get(operator["input_layout"]), operator["head_num"]
    if layout in ("BNSD", "BSND"):
        b, n, s, d = shape if layout == "BNSD" else (shape[0], shape[2], shape[1], shape[3])
    elif layout in ("BSH", "SBH"):
        b, s = shape[:2] if layout == "BSH" else (shape[1], shape[0])
        width = operator.tensor("query").shape[2] // heads
        n, d = (heads, shape[2] // heads) if name == "query" else (shape[2] // width, width)
    elif layout == "TND":
        b, s, n, d = 1, *shape
    else:
        raise Undecided(f"input_layout {layout}")
    return b, n, s, d


def attention_widths(operator: Operator) -> bool:
    q, k, v = (attention_sizes(operator, name)[3] for name in ("query", "key", "value"))
    return q == k >= v and all(1 <= width <= 512 and width % 16 == 0 for width in (q, v))


def attention_counts(operator: Operator) -> bool:
    (b, n, s, _), (_, kv, length, _) = (attention_sizes(operator, name) for name in ("query", "key"))
    return 1 <= n <= 256 and n % kv == 0 and b <= 2048 and max(s, length) <= 512 * 1024


def attention_mask(operator: Operator) -> bool:
    mask, mode = operator.tensor("attn_mask", optional=True), operator["sparse_mode"]
    if mask is None:
        return mode not in COMPRESSED
    (b, n, s, _), length = attention_sizes(operator, "query"), attention_sizes(operator, "key")[2]
    whole = [(b, n, s, length), (b, 1, s, length), (1, 1, s, length), (s, length)]
    return mask.dtype in MASKS and mask.shape in ([TRIANGLE] if mode in COMPRESSED else whole)


def given_lengths(operator: Operator) -> bool:
    """Whether the lengths of layout TND are in the graph."""
    try:
        ends = operator["actual_seq_kvlen"]
        return LAYOUTS.get(operator["input_layout"]) != "TND" or all(isinstance(end, int) for end in ends or ())
    except Undecided:
        return False


def packed_lengths(operator: Operator) -> bool:
    if LAYOUTS.get(operator["input_layout"]) != "TND" or not given_lengths(operator):
        return True
    ends, kv_ends = operator["actual_seq_qlen"], operator["actual_seq_kvlen"]
    if not ends or not kv_ends:
        return False
    lengths, kv = ([b - a for a, b in zip([0, *e], e, strict=False)] for e in (ends, kv_ends))
    pairs = list(zip(lengths, kv, strict=False))
    fits = all(q >= 0 and k > 0 for q, k in pairs) and len(ends) == len(kv_ends) <= 1024
    mode = operator["sparse_mode"]
    return fits and (mode == CAUSAL or mode == CAUSAL_TO_LAST and all(q <= k for q, k in pairs))


def turned(operator: Operator) -> tuple[int, ...]:
    return operator.tensor("dy" if "Grad" in operator.name else "x").shape


def rotary_layouts(operator: Operator) -> list[tuple[int, int, int]]:
    """Axes B, N and S of x for which cos has an allowed shape: whole along S; in half mode along B, or B and N, too."""
    x, cos = turned(operator), operator.tensor("cos").shape
    found = []
    for b, n, s in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        allowed = ((s,), (b, s), (b, n, s))[: 1 if operator["mode"] == INTERLEAVED else 3]
        if any(cos == tuple(x[i] if i in whole or i == 3 else 1 for i in range(4)) for whole in allowed):
            found.append((b, n, s))
    return found


def rotary_tables(operator: Operator) -> bool:
    known = operator["mode"] in (HALF, INTERLEAVED) and len(turned(operator)) == 4
    return known and operator.tensor("cos").shape == operator.tensor("sin").shape and bool(rotary_layouts(operator))


def rotary_rows(operator: Operator) -> bool:
    """In half mode the forward tiling of (B, N, S, D) has limits of its own: does D / 2 fill blocks of 32 bytes?"""
    x, layouts = turned(operator), rotary_layouts(operator)
    if not layouts:
        return True  # its tables are wrong
    b, n, s = (x[axis] for axis in layouts[0])
    if operator["mode"] == INTERLEAVED:
        return b * n < 1000
    fits = True
    if layouts[0] == (0, 1, 2) and operator.name == "RotaryPositionEmbedding":
        block = 32 // mindir.DTYPE_BYTES[operator.tensor("cos").dtype.upper()]
        fits = b * n <= 8 * s if x[3] // 2 % block == 0 else x[3] >= 80 or 2 * b * n <= -(-s // VECTOR_CORES)
    return fits and b < 1000 and n < 1000


def grouped_shapes(operator: Operator) -> bool:
    x, weight, y = operator.tensor("x"), operator.tensor("weight"), operator.results[0]
    ranks, turned_x = (len(x.shape), len(weight.shape), len(y.shape)), x.made_by in TRANSPOSES
    if operator["group_type"] == 2:
        return ranks == (2, 2, 3) and turned_x and weight.made_by not in TRANSPOSES
    return operator["group_type"] == -1 or ranks == (2, 3, 2) and not turned_x


TRANSPOSES = ("TransposeExtView", "TransposeExt", "Transpose", "TransposeView")


def grouped_types(operator: Operator) -> bool:
    operands = [operator.tensor(name) for name in ("x", "weight")]
    last = [t.shape[-2 if t.made_by in TRANSPOSES else -1] for t in operands]  # a transpose is a view
    return one_type(operator, "x", "weight") and max(last) <= 65535


def grouped_list(operator: Operator) -> bool:
    if operator["group_type"] == -1:
        return True
    groups = operator.tensor("group_list", optional=True)
    return groups is not None and groups.dtype == "int64" and len(groups.shape) == 1 and groups.shape[0] <= 1024


def choices(operator: Operator) -> int:
    """Token choices that a permutation or its inverse moves."""
    name = "indices" if operator.name == "MoeTokenPermute" else "sorted_indices"
    return prod(operator.tensor(name).shape)


def choices_of_a_token(operator: Operator) -> int:
    if operator.name == "MoeTokenPermuteGrad":
        return operator["num_topk"]
    given = operator.tensor("indices" if operator.name == "MoeTokenPermute" else "probs", optional=True)
    return 1 if given is None or len(given.shape) == 1 else given.shape[1]


def index_type(operator: Operator) -> bool:
    name = "indices" if operator.name == "MoeTokenPermute" else "sorted_indices"
    return operator.tensor(name).dtype in ("int32", "int64")


def weights_of_choices(operator: Operator) -> bool:
    given = operator.tensor("probs", optional=True)
    return given is None or len(given.shape) == 2 and prod(given.shape) == choices(operator)


def norm_types(operator: Operator) -> bool:
    pair = (operator.tensor("x").dtype, operator.tensor("gamma").dtype)
    rstd = operator.tensor("rstd") if operator.name == "RmsNormGrad" else operator.results[1]
    return pair in NORM_TYPES and rstd.dtype == "float"


def even_split(operator: Operator) -> bool:
    return operator.tensor("input").shape[operator["dim"]] % 2 == 0


def same_states(operator: Operator) -> bool:
    states = [operator.tensor(name) for name in ("var", "m", "v", "grad")]
    scalars = [operator.value(name) for name in ("lr", "beta1", "beta2", "epsilon")]
    return len({(s.dtype, s.shape) for s in states}) == 1 and all(prod(getattr(s, "shape", ())) == 1 for s in scalars)


def same_updates(operator: Operator) -> bool:
    var, m, v, _, gradient = (operator.tensor(name) for name in NAMES["AdamW"][:5])
    return var.dtype == gradient.dtype and m.dtype == v.dtype and len({t.shape for t in (var, m, v, gradient)}) == 1


def never(operator: Operator) -> bool:
    return False


# --- the table ---

ATTENTION = "FlashAttentionScore FlashAttentionScoreGrad"
ROTARIES = "RotaryPositionEmbedding RotaryPositionEmbeddingGrad"
UNPERMUTES = "InnerMoeTokenUnpermute MoeTokenUnpermuteGrad"
MOVES = f"MoeTokenPermute MoeTokenPermuteGrad {UNPERMUTES}"
DETERMINISTIC = "gives the same bits each time only with context.deterministic: 'ON'"


def same_rows(o: Operator) -> bool:
    k, v = attention_sizes(o, "key"), attention_sizes(o, "value")
    return k[:3] == v[:3] and attention_sizes(o, "query")[0] == k[0]


RULES = (
    Rule(ATTENTION, "query, key and value have one type of float16, bfloat16, float32", FLASH,
         lambda o: one_type(o, "query", "key", "value")),
    Rule(ATTENTION, "heads are as wide in query as in key, not wider in value, at most 512, a multiple of 16",
         f"{FLASH}; {WHEEL}", attention_widths),
    Rule(ATTENTION, "key and value have equal shapes", WHEEL,
         lambda o: o.tensor("key").shape == o.tensor("value").shape, DOUBTFUL,
         "stays: CANN's document allows narrower values, and MindSpore gives the result their width (docs/graph.md)"),
    Rule(ATTENTION, "1 to 256 heads, a multiple of the key's; at most 2048 samples and 524288 tokens", WHEEL,
         attention_counts),
    Rule(ATTENTION, "batch, heads and length of key and value are equal, and all batches", FLASH, same_rows),
    Rule(ATTENTION, "sparse_mode is 0 to 4", WHEEL, lambda o: o["sparse_mode"] in range(5)),
    Rule(ATTENTION, "the mask is uint8 or bool: (2048, 2048) for sparse_mode 2, 3, 4, else (B or 1, N or 1, S, S) or "
         "(S, S)", FLASH, attention_mask),
    Rule(ATTENTION, "lengths of layout TND do not decrease, at most 1024, none of key 0, sparse_mode 2 or 3", WHEEL,
         packed_lengths),
    Rule(ATTENTION, "lengths of layout TND are known", WHEEL, given_lengths, DOUBTFUL,
         "stays: the loader's, in order and counted (config/run_rules.py); documents without tokens fill the list, as "
         "MindFormers'"),
    Rule(ROTARIES, "cos and sin are (1, 1, S, D) for x (B, N, S, D), or with its axes in x's order; in half mode also "
         "(B, 1, S, D) and x's shape", ROTARY, rotary_tables),
    Rule(ROTARIES, "B * N < 1000 in mode 1; in mode 0 B, N < 1000, and B * N <= 8 * S forward", ROTARY, rotary_rows),
    Rule(ROTARIES, "the width D is even and below 896", ROTARY,
         lambda o: turned(o)[-1] < 896 and turned(o)[-1] % 2 == 0),
    Rule("RotaryPositionEmbedding", "x, cos and sin have one type", ROTARY, lambda o: one_type(o, "x", "cos", "sin")),
    Rule("RotaryPositionEmbeddingGrad", "dy, cos and sin have one type", ROTARY_GRAD,
         lambda o: one_type(o, "dy", "cos", "sin")),
    Rule("RotaryPositionEmbeddingGrad", "B * N <= 1024 where gradients of cos and sin are asked for", ROTARY_GRAD,
         lambda o: o.tensor("x", optional=True) is None or prod(turned(o)[:2]) <= 1024),
    Rule("GroupedMatmul", "group_type 0: x (M, K) not transposed, weight (E, K, N); group_type 2: x transposed, weight "
         "(M, N), a result of rank 3", GROUPED, grouped_shapes),
    Rule("GroupedMatmul", "group_list is int64 of rank 1, at most 1024 groups", f"{GROUPED}; {GROUPED_WHEEL}",
         grouped_list),
    Rule("GroupedMatmul", "one x, one weight, one type of float16, bfloat16, float32; their axes that are last "
         "in memory are up to 65535", GROUPED, grouped_types),
    Rule("GroupedMatmul", "split_item 3 with group_type 0 (2 in its gradient), or 0 with -1", GROUPED_WHEEL,
         lambda o: (o["split_item"], o["group_type"]) in ((3, 0), (3, 2), (0, -1))),
    Rule("GroupedMatmul", "a gradient exists only without bias, scale and offset", GROUPED_WHEEL,
         lambda o: all(o.value(name) in (None, ()) for name in NAMES["GroupedMatmul"][2:7])),
    Rule("GroupedMatmul", "rows past the last number of group_list are not written", GROUPED,
         lambda o: o["group_type"] != 0, DOUBTFUL,
         "stays: the buffer is static; the experts mask these rows before anything sums them"),
    Rule(MOVES, "a token has at most 512 choices", PERMUTE, lambda o: choices_of_a_token(o) <= 512),
    Rule(MOVES, "indices are int32 or int64", PERMUTE, index_type),
    Rule(MOVES, "fewer than 16,777,215 token choices", PERMUTE, lambda o: choices(o) < ROWS_LIMIT),
    Rule(MOVES, "padded_mode is False", PERMUTE, lambda o: not o["padded_mode"]),
    Rule(UNPERMUTES, "probs are (T, K) where there are T * K indices", UNPERMUTE, weights_of_choices),
    Rule("RmsNorm RmsNormGrad", "x and gamma are bf16/bf16, bf16/fp32, fp16/fp16, fp16/fp32 or fp32/fp32; rstd is fp32",
         NORM_GRAD, norm_types),
    Rule("RmsNormGrad", "the gradient of gamma is float32", NORM_GRAD, lambda o: o.results[1].dtype == "float"),
    Rule("RmsNormGrad", DETERMINISTIC, NORM_GRAD, never, DOUBTFUL,
         "stays: losses agree within rounding; a resume that must be exact needs the switch"),
    Rule("Swiglu SwigluGrad", "the axis that is split is even", SWIGLU, even_split),
    Rule("ApplyAdamW", "var, m, v and grad have one type and shape, the rates one element", ADAMW, same_states),
    Rule("AdamW", "var and grad, and m and v, have one type, and all one shape", ADAMW, same_updates),
    Rule("*", "no tensor has more than 8 axes", ALL_RANKS, lambda o: all(len(t.shape) <= 8 for t in o.known())),
)  # fmt: skip

# Operators that the plugin runs by their old kernel (compiled by GE, or on the AI CPU): name, then what replaces it.
WITHOUT_ACLNN = {
    "Dropout": "use DropoutExt",
    "DropoutGrad": "use DropoutExt, whose gradient is DropoutGradExt",
    "TopK": "use TopkExt",
    "OneHot": "use OneHotExt",
    "Gather": "stays without a pipeline (embedding_and_loss.py); else Embedding for tables, or IndexSelect",
    "UnsortedSegmentSum": "stays without a pipeline, as Gather; else use Embedding; this one adds in any order",
    "StridedSliceGrad": "use SliceExt or SplitWithSize, whose gradients are a copy and Concat",
    "CumSum": "stays: numbers of rows, no states; MindFormers' graph runs the same kernel",
    "ReduceMean": "use MeanExt",
    "AddN": "stays: MindSpore adds gradients of one value with it",
    "StridedSlice": "stays: our cells' slices carry strategies; use SliceExt where it takes the same",
    "Assign": "stays: the optimizer and the pipeline write so",
    "AssignAdd": "stays: gradient accumulation and counters",
    "TensorMove": "stays: the compiler copies parameters so",
    "Addcmul": "stays: MindFormers' AdamW; one AdamW operator replaces all of it (optimizer.use_fused)",
    "FillV2": "stays: constants, once a step",
    "NPUGetFloatStatusV2": "stays: MindFormers' overflow check; AllFinite replaces it",
    "NPUClearFloatStatusV2": "stays: MindFormers' overflow check; AllFinite replaces it",
}  # fmt: skip
RULES += tuple(
    Rule(name, "has no aclnn kernel in MindSpore's plugin", PLUGIN, never, DOUBTFUL, remedy)
    for name, remedy in WITHOUT_ACLNN.items()
)
# Operators of our graphs that the plugin runs by aclnn kernels, or as views without a kernel.
HAVE_KERNELS = words(
    "MatMul BatchMatMul Add Sub Mul Div RealDiv Muls Divs Neg Square Sqrt Reciprocal Pow Exp Log Cos Sin Sigmoid SiLU "
    "SiLUGrad SigmoidGrad ReLU Maximum Minimum ClampScalar Equal NotEqual Less LessEqual Greater GreaterEqual EqScalar "
    "LessScalar GreaterEqualScalar LogicalAnd LogicalOr LogicalNot Select MaskedFill Cast SumExt ReduceSum "
    "MeanExt ReduceAll Concat SplitWithSize SplitTensor Tile BroadcastTo Transpose TransposeExtView Reshape ExpandDims "
    "Squeeze GatherD GatherDGradV2 IndexAddExt IndexSelect TopkExt OneHotExt CumsumExt AllFinite FloorDiv ReduceMax "
    "ReduceMin Softmax SoftmaxBackward Rsqrt Abs Floor Embedding EmbeddingDenseBackward SliceExt SortExt DropoutExt "
    "DropoutGradExt NonZero Zeros ZerosLike MoveTo ScatterValue ScatterAddExt LogSoftmax IsFinite"
)
