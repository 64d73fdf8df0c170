"""The table of Ascend's operator rules: each violation planted in a small graph, and its legal neighbours."""

import re
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from mindformers_ext.config.run import read_run
from mindformers_ext.dryrun.device_profile import load_profile
from mindformers_ext.dryrun.report import DOES_NOT_FIT, make_report
from mindformers_ext.dryrun.terminal_report import audit_table, render_ranks
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler.operator_rules import (
    DOCUMENTED,
    DOUBTFUL,
    HAVE_KERNELS,
    RULES,
    VIOLATION,
    WITHOUT_ACLNN,
    audit,
)
from mindformers_ext.rank_compiler.operators import NAMES
from mindformers_ext.rank_compiler.rank_pool import COMPILED, RankResult
from tests.helpers.mindir_model import Model

BF16, FP32 = "bfloat16", "float"
QUERY = (BF16, (1, 32, 4096, 192))
X, TABLE, BSND_TABLE = (BF16, (1, 32, 4096, 64)), (BF16, (1, 1, 4096, 64)), (BF16, (1, 4096, 1, 64))
ROWS, EXPERTS, GROUPS = (BF16, (512, 64)), (BF16, (8, 64, 96)), ("int64", (8,))
GROUPED = {"x": [ROWS], "weight": [EXPERTS], "group_list": GROUPS, "split_item": 3, "group_type": 0}
STATE, ONE = (FP32, (64, 64)), (FP32, ())
# Legal uses, as the 671B run has them: inputs by name, others None; then the results' shapes.
LEGAL = {
    "FlashAttentionScore": (
        {"query": QUERY, "key": QUERY, "value": QUERY, "attn_mask": ("uint8", (2048, 2048)), "head_num": 32}
        | {"input_layout": 1, "sparse_mode": 2},
        [(1, 32, 4096, 8), (1, 32, 4096, 8), (1,), QUERY[1]],
    ),
    "RotaryPositionEmbedding": ({"x": X, "cos": TABLE, "sin": TABLE, "mode": 1}, [X[1]]),
    "RotaryPositionEmbeddingGrad": ({"dy": X, "cos": TABLE, "sin": TABLE, "mode": 1}, [X[1]]),
    "GroupedMatmul": (GROUPED, [(512, 96)]),
    "MoeTokenPermute": ({"tokens": ROWS, "indices": ("int32", (512, 8)), "padded_mode": False}, [(4096, 64), (4096,)]),
    "MoeTokenPermuteGrad": (
        {"permuted_tokens_grad": (BF16, (4096, 64)), "sorted_indices": ("int32", (4096,)), "num_topk": 8}
        | {"padded_mode": False},
        [ROWS[1]],
    ),
    "InnerMoeTokenUnpermute": (
        {"permuted_tokens": (BF16, (4096, 64)), "sorted_indices": ("int32", (4096,)), "probs": (BF16, (512, 8))}
        | {"padded_mode": False},
        [ROWS[1]],
    ),
    "RmsNorm": ({"x": ROWS, "gamma": (FP32, (64,)), "epsilon": 1e-6}, [ROWS[1], (512, 1)]),
    "RmsNormGrad": ({"dy": ROWS, "x": ROWS, "rstd": (FP32, (512, 1)), "gamma": (FP32, (64,))}, [ROWS[1], (64,)]),
    "Swiglu": ({"input": ROWS, "dim": -1}, [(512, 32)]),
    "ApplyAdamW": (
        dict.fromkeys(("var", "m", "v", "grad"), STATE) | dict.fromkeys(("lr", "beta1", "beta2", "epsilon"), ONE),
        [STATE[1]] * 3,
    ),
    "AdamW": (dict.fromkeys(("var", "m", "v", "max_v", "gradient"), STATE), [STATE[1]] * 3),
}
WEIGHT_GRADIENT = {"x": [("transposed", (64, 512))], "weight": [(BF16, (512, 96))], "group_type": 2}
BATCH = {"x": (BF16, (2, 32, 4096, 64)), "cos": (BF16, (2, 1, 4096, 64)), "sin": (BF16, (2, 1, 4096, 64))}


def graph(operator: str, changes: dict, results: list | None = None) -> Model:
    """A graph of one legal use of an operator, with some of its inputs changed."""
    model = Model()
    inputs, shapes = LEGAL[operator]
    inputs = inputs | changes

    def made(name: str, value) -> str:
        if isinstance(value, list):
            return model.apply("MakeTuple", [made(f"{name}{i}", v) for i, v in enumerate(value)], name)
        if isinstance(value, tuple) and value and value[0] == "transposed":
            model.apply("TransposeExtView", [], name, value[1])
            model.proto.graph.node[-1].attribute[0].tensors[0].data_type = pb.TensorProto.BFLOAT16
            return name
        if isinstance(value, tuple) and value and isinstance(value[0], str):
            return model.given(name, *value)
        return model.constant(name, value)

    names = [made(name, inputs.get(name)) for name in NAMES[operator]]
    model.apply(operator, names, "result", *(results or shapes))
    model.proto.graph.node[-1].domain = "Default/network-Net/layer-Layer/norm-FusedNorm/Op-op1"
    return model


def verdicts(model: Model, operator: str, **options) -> dict[str, list[str]]:
    found = [finding for finding in audit(model.proto, **options) if finding.operator == operator]
    return {v: [f.demand for f in found if f.verdict == v] for v in (VIOLATION, DOUBTFUL, DOCUMENTED)}


NEIGHBOURS = [
    *((operator, {}, None) for operator in LEGAL),
    ("FlashAttentionScore", {"attn_mask": ("bool", (1, 1, 4096, 4096)), "sparse_mode": 0}, None),
    ("FlashAttentionScore", {"attn_mask": None, "sparse_mode": 0}, None),
    ("RotaryPositionEmbedding", {**BATCH, "mode": 0}, None),
    ("RotaryPositionEmbedding", {"cos": X, "sin": X, "mode": 0}, None),
    ("RotaryPositionEmbedding", {"x": (BF16, (1, 4096, 32, 64)), "cos": BSND_TABLE, "sin": BSND_TABLE}, None),
    ("RotaryPositionEmbedding", {"x": (BF16, (7, 142, 4096, 64))}, None),
    ("GroupedMatmul", {"weight": [("transposed", (8, 64, 70_000))]}, [(512, 70_000)]),
    ("GroupedMatmul", WEIGHT_GRADIENT, [(8, 64, 96)]),
    ("GroupedMatmul", WEIGHT_GRADIENT | {"x": [("transposed", (64, 70_000))]}, [(8, 64, 96)]),
    ("RmsNorm", {"x": (FP32, (512, 64))}, None),
]


@pytest.mark.parametrize(("operator", "changes", "results"), NEIGHBOURS)
def test_legal_uses_break_nothing(operator, changes, results):
    found = verdicts(graph(operator, changes, results), operator)
    assert found[VIOLATION] == []
    assert not any("not say" in demand for demand in found[DOUBTFUL])


MANY = (BF16, (1, 1000, 64, 64))
PLANTED = [
    ("FlashAttentionScore", {"key": (FP32, QUERY[1])}, "one type"),
    ("FlashAttentionScore", dict.fromkeys(("query", "key", "value"), ("int8", QUERY[1])), "one type"),
    ("FlashAttentionScore", {"value": (BF16, (1, 32, 4096, 208))}, "as wide"),
    ("FlashAttentionScore", dict.fromkeys(("query", "key", "value"), (BF16, (1, 32, 4096, 528))), "as wide"),
    ("FlashAttentionScore", dict.fromkeys(("query", "key", "value"), (BF16, (1, 32, 4096, 100))), "as wide"),
    ("FlashAttentionScore", dict.fromkeys(("key", "value"), (BF16, (1, 24, 4096, 192))), "a multiple of the key's"),
    ("FlashAttentionScore", dict.fromkeys(("query", "key", "value"), (BF16, (1, 257, 512, 64))), "1 to 256 heads"),
    ("FlashAttentionScore", {"value": (BF16, (1, 32, 2048, 192))}, "length of key and value"),
    ("FlashAttentionScore", {"sparse_mode": 6}, "sparse_mode is 0 to 4"),
    ("FlashAttentionScore", {"attn_mask": None}, "the mask"),
    ("FlashAttentionScore", {"attn_mask": ("uint8", (4096, 4096))}, "the mask"),
    ("FlashAttentionScore", {"attn_mask": (BF16, (2048, 2048))}, "the mask"),
    ("FlashAttentionScore", {"sparse_mode": 0}, "the mask"),
    ("RotaryPositionEmbedding", BATCH, "cos and sin are"),
    ("RotaryPositionEmbedding", {"sin": X}, "cos and sin are"),
    ("RotaryPositionEmbedding", {"mode": 2}, "cos and sin are"),
    ("RotaryPositionEmbedding", {"cos": (FP32, TABLE[1])}, "one type"),
    ("RotaryPositionEmbedding", {"x": (BF16, (8, 125, 4096, 64))}, "B * N < 1000"),
    ("RotaryPositionEmbedding", {"x": MANY, "cos": MANY, "sin": MANY, "mode": 0}, "B, N < 1000"),
    ("RotaryPositionEmbedding", {"x": (BF16, (8, 125, 64, 64)), "mode": 0}
     | dict.fromkeys(("cos", "sin"), (BF16, (1, 1, 64, 64))), "B * N <= 8 * S"),
    ("RotaryPositionEmbedding", {"x": (BF16, (1, 128, 2048, 24)), "mode": 0}
     | dict.fromkeys(("cos", "sin"), (BF16, (1, 1, 2048, 24))), "B * N <= 8 * S"),
    ("RotaryPositionEmbedding", {"x": (BF16, (1, 1, 4096, 896))}
     | dict.fromkeys(("cos", "sin"), (BF16, (1, 1, 4096, 896))), "below 896"),
    ("RotaryPositionEmbeddingGrad", {"dy": (FP32, X[1])}, "one type"),
    ("RotaryPositionEmbeddingGrad", {"dy": (BF16, (2, 600, 4096, 64)), "x": (BF16, (2, 600, 4096, 64)), "mode": 0},
     "B * N <= 1024"),
    ("GroupedMatmul", {"group_list": None}, "group_list"),
    ("GroupedMatmul", {"group_list": ("int32", (8,))}, "group_list"),
    ("GroupedMatmul", {"group_list": ("int64", (1025,))}, "group_list"),
    ("GroupedMatmul", {"x": [("transposed", (512, 64))]}, "not transposed"),
    ("GroupedMatmul", {"weight": [(BF16, (64, 96))]}, "weight (E, K, N)"),
    ("GroupedMatmul", {"group_type": 2, "weight": [(BF16, (512, 96))]}, "x transposed"),
    ("GroupedMatmul", {"weight": [(FP32, EXPERTS[1])]}, "one type"),
    ("GroupedMatmul", {"weight": [(BF16, (8, 64, 70_000))]}, "up to 65535"),
    ("GroupedMatmul", {"split_item": 0}, "split_item 3"),
    ("GroupedMatmul", {"bias": [(FP32, (8, 96))]}, "without bias"),
    ("MoeTokenPermute", {"indices": ("int32", (2, 513))}, "512 choices"),
    ("MoeTokenPermute", {"indices": (FP32, (512, 8))}, "int32 or int64"),
    ("MoeTokenPermute", {"indices": ("int32", (2_097_152, 8))}, "16,777,215"),
    ("MoeTokenPermute", {"padded_mode": True}, "padded_mode"),
    ("MoeTokenPermuteGrad", {"num_topk": 513}, "512 choices"),
    ("InnerMoeTokenUnpermute", {"probs": (BF16, (512, 4))}, "probs are"),
    ("RmsNorm", {"x": (FP32, (512, 64)), "gamma": (BF16, (64,))}, "x and gamma"),
    ("RmsNormGrad", {"rstd": (BF16, (512, 1))}, "x and gamma"),
    ("Swiglu", {"input": (BF16, (512, 65))}, "even"),
    ("ApplyAdamW", {"m": (BF16, STATE[1])}, "one type and shape"),
    ("ApplyAdamW", {"lr": (FP32, (2,))}, "the rates"),
    ("AdamW", {"gradient": (BF16, STATE[1])}, "var and grad"),
    ("RmsNorm", {"x": (BF16, (1,) * 8 + (64,))}, "8 axes"),
]  # fmt: skip


# Planted in tests of their own below.
OTHERS = ("lengths of layout TND", "the gradient of gamma")


def test_every_violation_is_planted():
    planted = [(operator, words) for operator, _, words in PLANTED]
    rules = [rule for rule in RULES if rule.verdict == VIOLATION and not rule.demand.startswith(OTHERS)]
    missing = [
        rule.demand
        for rule in rules
        if not any(
            words in rule.demand and (rule.operators == "*" or name in rule.operators) for name, words in planted
        )
    ]
    assert not missing


@pytest.mark.parametrize(("operator", "changes", "words"), PLANTED)
def test_planted_violations_are_found(operator, changes, words):
    found = verdicts(graph(operator, changes), operator)
    assert any(words in demand for demand in found[VIOLATION]), found


def test_packed_lengths():
    packed = dict.fromkeys(("query", "key", "value"), (BF16, (4096, 32, 192))) | {"input_layout": 4, "sparse_mode": 3}
    legal = packed | {"actual_seq_qlen": (1024, 4096), "actual_seq_kvlen": (1024, 4096)}
    assert verdicts(graph("FlashAttentionScore", legal), "FlashAttentionScore")[VIOLATION] == []
    for lengths in ((4096, 1024), (0, 4096), (4096,), None):
        found = verdicts(graph("FlashAttentionScore", legal | {"actual_seq_kvlen": lengths}), "FlashAttentionScore")
        assert any("layout TND" in demand for demand in found[VIOLATION]), lengths


def test_packed_lengths_of_the_data():
    """Computed ones are nobody's violation, and the reason is said."""
    packed = dict.fromkeys(("query", "key", "value"), (BF16, (4096, 32, 192))) | {"input_layout": 4, "sparse_mode": 3}
    lengths = dict.fromkeys(("actual_seq_qlen", "actual_seq_kvlen"), [("int64", (4,))])  # tuples of tensors
    found = verdicts(graph("FlashAttentionScore", packed | lengths), "FlashAttentionScore")
    assert found[VIOLATION] == [] and "lengths of layout TND are known" in found[DOUBTFUL]


def test_the_gradient_of_gamma_is_float32():
    model = graph("RmsNormGrad", {})
    model.proto.graph.node[-1].attribute[0].values[1].tensors[0].data_type = pb.TensorProto.BFLOAT16
    assert any("gradient of gamma" in demand for demand in verdicts(model, "RmsNormGrad")[VIOLATION])


def test_doubtful_uses_name_a_replacement_or_a_reason():
    model = graph("RmsNormGrad", {})
    model.apply("TopK", [], "best", (8,), (8,))
    model.apply("NewOperator", [], "new", (8,))
    doubtful = {f.operator: f for f in audit(model.proto) if f.verdict == DOUBTFUL}
    assert doubtful["TopK"].remedy == "use TopkExt"
    assert "deterministic" in doubtful["RmsNormGrad"].demand
    assert "not in the table" in doubtful["NewOperator"].demand
    assert all(f.remedy for f in doubtful.values())
    assert all(rule.remedy for rule in RULES if rule.verdict == DOUBTFUL)
    assert verdicts(model, "RmsNormGrad", deterministic=True)[DOUBTFUL] == []


def test_shapes_that_only_a_device_knows_are_doubtful():
    found = verdicts(graph("MoeTokenPermute", {"indices": ("int32", (-1, 8))}), "MoeTokenPermute")
    assert found[VIOLATION] == [] and found[DOUBTFUL]
    found = verdicts(graph("Swiglu", {"input": (BF16, (512, -1))}), "Swiglu")
    assert found == {VIOLATION: [], DOUBTFUL: ["the axis that is split is even"], DOCUMENTED: []}


def test_rows_that_only_a_device_counts_decide_no_rule_about_columns():
    """Experts' buffers are as long as their tokens: Swiglu's width is known all the same, and an odd one is found."""
    found = verdicts(graph("Swiglu", {"input": (BF16, (-1, 64))}, [(-1, 32)]), "Swiglu")
    assert found == {VIOLATION: [], DOUBTFUL: [], DOCUMENTED: [""]}
    assert verdicts(graph("Swiglu", {"input": (BF16, (-1, 65))}), "Swiglu")[VIOLATION]
    wide = {"x": [(BF16, (-1, 70_000))]}
    assert verdicts(graph("GroupedMatmul", wide), "GroupedMatmul")[VIOLATION]


def test_a_violation_names_the_models_line_and_ends_the_dry_run_with_1():
    model = graph("RotaryPositionEmbedding", BATCH)
    findings = audit(model.proto, {"Layer": "model.py:12", "FusedNorm": "norm.py:7"})
    assert findings[0].verdict == VIOLATION and findings[0].places == ["norm.py:7 (FusedNorm)"]
    compiled = {"weights": [], "parameters": {}, "collectives": [], "layouts": {}, "peak_rss_bytes": 1}
    results = [
        RankResult(rank, 0, COMPILED, 1.0, "log", compiled=compiled | {"audit": [asdict(f) for f in findings]})
        for rank in (0, 1)
    ]
    cluster = Path(__file__).parents[1] / "helpers" / "runs" / "cluster_671b.yaml"
    report = make_report(read_run(cluster, 1024), load_profile(), [], None, results)
    assert report["exit_code"] == DOES_NOT_FIT and "RotaryPositionEmbedding first" in report["verdict"]
    shown = render_ranks(report)
    assert "rank 0: RotaryPositionEmbedding mode=1 of (2, 32, 4096, 64)" in shown and "at norm.py:7" in shown
    assert re.search(r"violation +2  no +RotaryPositionEmbedding  mode=1", audit_table(report))


def test_an_audit_says_what_mindformers_own_graph_runs():
    model = graph("Swiglu", {})
    model.proto.graph.node[-1].attribute[0].tensors[0].data_type = pb.TensorProto.BFLOAT16
    model.apply("Cast", [model.given("small", "int8", (8,))], "cast", (8,))
    assert {f.operator: f.in_mindformers for f in audit(model.proto)} == {"Swiglu": True, "Cast": False}


def test_the_plugin_has_the_kernels_that_the_table_says():
    """Kernel classes by name; views need none, and two have another operator's name."""
    library = Path(find_spec("mindspore").origin).parent / "lib" / "plugin" / "libmindspore_ops_ascend.so"
    name = rb"N9mindspore6kernel(?!7pyboost)[a-z0-9_]*?\d(?:Aclnn)?([A-Z]\w*?)(?:AclnnKernelMod|KernelModILm\d|Ascend)E"
    content = library.read_bytes()
    classes = set(re.findall(name, content))
    has = {name.decode() for name in classes}
    without = {name for name in HAVE_KERNELS if name not in has}
    views = {"BatchMatMul", "GatherDGradV2", "Reshape", "ExpandDims", "Squeeze", "TransposeExtView"}
    zeros = {"Zeros", "ZerosLike"}  # aclnnInplaceZero on new memory
    assert without == views | zeros | {"MoveTo"}  # a copy between host and device, by the runtime
    assert b"aclnnInplaceZero" in content and b"MoveToAscendCustomize" in content
    assert not set(WITHOUT_ACLNN) & has
