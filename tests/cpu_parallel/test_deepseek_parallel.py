"""DeepSeek-V3 (one dense, one MoE layer) over ranks equals the single process: losses, gradients, parameters."""

from pathlib import Path

import pytest

from mindformers_ext.cpu_parallel import verify

TESTS = Path(__file__).parents[1]
PYTHON_PATH = (str(TESTS.parent), str(TESTS), str(TESTS.parent / "research" / "deepseek3"))
PROBLEM = verify.Problem("cpu_parallel.small_deepseek", PYTHON_PATH)


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    PROBLEM.single(None, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", PROBLEM.layouts().values(), ids=lambda layout: layout.name)
def test_layout_equals_single_process(single, tmp_path, layout):
    row = verify.run_layout(PROBLEM, layout, single, tmp_path)
    assert row.passed, verify.table([row])
