"""Samples with positions of their own, over ranks: CANN's rotary operator is called as it documents, numbers agree."""

from pathlib import Path

import pytest

from mindformers_ext.cpu_parallel import verify
from mindformers_ext.rank_compiler import mind_ir as pb
from mindformers_ext.rank_compiler import mindir, rank_pool
from mindformers_ext.rank_compiler.stand_in_cann import COMPILE

TESTS = Path(__file__).parents[1]
PYTHON_PATH = (str(TESTS.parent), str(TESTS), str(TESTS.parent / "research" / "deepseek3"))
PROBLEM = verify.Problem("cpu_parallel.packed_deepseek", PYTHON_PATH)
DOCUMENTS = verify.Problem("cpu_parallel.documents_deepseek", PYTHON_PATH)
SMALL = verify.Problem("cpu_parallel.small_deepseek", PYTHON_PATH)
HALF, INTERLEAVED = 0, 1


def rotary_calls(folder: Path) -> list[tuple[int, list[int], list[int], list[int], set[int]]]:
    """(mode, dims of x, of cos, of sin, their types) of every rotary operator in a rank's graph, gradients included."""
    model = mindir.load_model((folder / "graph.mindir").read_bytes())
    operators = {f"REF::{p.name}": p.op_type for p in model.primitives}
    inputs = {"RotaryPositionEmbedding": 4, "RotaryPositionEmbeddingGrad": 5}  # the last one is the mode
    calls = []
    for function in (model.graph, *model.functions):
        for node in function.node:
            count = inputs.get(operators.get(node.op_type, ""))
            if count:
                tensors = [attribute_of(model, function, name).tensors[0] for name in node.input[:3]]
                mode = attribute_of(model, function, node.input[count - 1]).i
                calls.append((mode, *[list(t.dims) for t in tensors], {t.data_type for t in tensors}))
    return calls


def attribute_of(model: pb.ModelProto, function: pb.GraphProto, name: str) -> pb.AttributeProto:
    """What the graph says of a value: its shape and type, or the constant that it is."""
    nodes = (node for part in (function, model.graph) for node in part.node if node.output[0] == name)
    return next(a for a in next(nodes).attribute if a.name in ("shape", "value"))


def assert_documented(calls) -> None:
    """docs/aclnnRotaryPositionEmbedding.md and rope_interleaved_tiling.cpp of CANN's ops-transformer, Atlas A2/A3."""
    assert calls
    for mode, x, cos, sin, types in calls:
        batch, heads, length, width = x
        assert len(types) == 1 and cos == sin and width % 2 == 0 and width < 896, (mode, x, cos)
        if mode == INTERLEAVED:
            assert cos == [1, 1, length, width] and batch * heads < 1000, (x, cos)
        else:
            assert mode == HALF and batch < 1000 and heads < 1000, (mode, x)
            assert cos in ([1, 1, length, width], [batch, 1, length, width], x), (x, cos)


@pytest.mark.parametrize("problem", [PROBLEM, SMALL], ids=["packed", "plain"])
def test_rotary_calls_are_documented(tmp_path, problem):
    layout = problem.layouts()["dp2-packed" if problem is PROBLEM else "mp2-fused"]
    builder = verify.launch.Builder(f"{problem.module}:build", layout.arguments, PYTHON_PATH)
    jobs = rank_pool.RankJobs(
        module=builder.module,
        arguments=builder.module_arguments,
        world_size=layout.world_size,
        devices_per_stage=layout.world_size,
        out=tmp_path,
        level=COMPILE,
        python_path=PYTHON_PATH,
    )
    (result,) = rank_pool.compile_ranks(jobs, [0], 1)
    assert result.status == rank_pool.COMPILED, (result.message, result.compiler_errors)
    calls = rotary_calls(tmp_path / "rank_0")
    assert_documented(calls)
    if problem is PROBLEM:
        assert all(x[0] == 2 and cos[0] == 2 for _, x, cos, _, _ in calls)  # two samples a device, each with its table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem", "layout"),
    [(problem, layout) for problem in (PROBLEM, DOCUMENTS) for layout in problem.layouts().values()],
    ids=lambda value: getattr(value, "name", ""),
)
def test_layout_equals_single_process(tmp_path, problem, layout):
    """Documents by their ends, too: in rank graphs Ascend's operator in layout TND, here kernels of their own."""
    problem.single(None, tmp_path / "single")
    row = verify.run_layout(problem, layout, tmp_path / "single", tmp_path / layout.name)
    assert row.passed, verify.table([row])
