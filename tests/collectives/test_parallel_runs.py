"""Toy transformer: compiled for every rank of a layout, lowered, run as processes, equal to the single process."""

from pathlib import Path

import pytest

from mindformers_ext.cpu_parallel import launch
from mindformers_ext.cpu_parallel.compare import Comparison, compare

TESTS = Path(__file__).parent
PYTHON_PATH = (str(TESTS.parents[1]), str(TESTS.parent))
STEPS = 5


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Path:
    """Folder of the single process's run."""
    folder = tmp_path_factory.mktemp("single")
    launch.run_reference(launch.Builder("collectives.toy_transformer:build_single", {"steps": STEPS}, PYTHON_PATH), folder)
    return folder


def run_layout(single: Path, folder: Path, **degrees) -> Comparison:
    for name in ("initial.npz", "batches.npz"):
        (folder / name).symlink_to(single / name)
    stages = degrees.get("pp", 1)
    world_size = degrees.get("dp", 1) * degrees.get("mp", 1) * stages
    launch.compile_ranks(launch.Builder("collectives.toy_transformer:build", degrees, PYTHON_PATH), world_size, folder)
    launch.run_ranks(folder, world_size, stages)
    return compare(single, folder, world_size, stages, degrees.get("micro", 1))


def check(comparison: Comparison) -> None:
    assert comparison.passed, comparison
    assert len(comparison.losses) == STEPS
    assert comparison.losses[-1] < comparison.losses[0]  # the toy learns: the runs are not equal because nothing moves


@pytest.mark.parametrize(
    "degrees",
    [{"mp": 2}, {"dp": 2, "mp": 2, "shard_optimizer": True}, {"pp": 2, "micro": 2}],
    ids=["mp2", "dp2-mp2-optimizer", "pp2"],
)
def test_layout_equals_single_process(single, tmp_path, degrees):
    check(run_layout(single, tmp_path, **degrees))


@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [
        {"dp": 2},
        {"dp": 4, "shard_optimizer": True},
        {"dp": 4, "shard_optimizer": True, "shard_size": 2},
        {"mp": 4},
        {"pp": 2, "micro": 4, "mp": 2, "shard_optimizer": True},
        {"pp": 2, "micro": 4, "dp": 2, "shard_optimizer": True},
        {"pp": 2, "dp": 2, "mp": 2, "micro": 2},
    ],
    ids=lambda degrees: "-".join(f"{name}{int(value)}" for name, value in degrees.items()),
)
def test_more_layouts_equal_single_process(single, tmp_path, degrees):
    check(run_layout(single, tmp_path, **degrees))
