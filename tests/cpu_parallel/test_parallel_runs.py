"""Toy transformer: compiled for every rank of a layout, lowered, run as processes, equal to the single process."""

import json
import shutil
from pathlib import Path

import pytest
from cpu_parallel.toy_transformer import LAYOUTS

from mindformers_ext.cpu_parallel import launch, verify
from mindformers_ext.cpu_parallel.compare import compare
from mindformers_ext.cpu_parallel.run_rank import rank_folder

TESTS = Path(__file__).parents[1]
PROBLEM = verify.Problem("cpu_parallel.toy_transformer", (str(TESTS.parent), str(TESTS)))
QUICK, BROKEN = 5, LAYOUTS[1]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """Folder with the single process's run; the layouts' runs are put beside it."""
    folder = tmp_path_factory.mktemp("runs")
    PROBLEM.single(None, folder / "single")
    return folder


def check(runs: Path, layout: verify.Layout) -> None:
    row = verify.run_layout(PROBLEM, layout, runs / "single", runs / layout.name)
    assert row.passed, verify.table([row])
    losses = row.comparison.losses
    assert len(losses) == PROBLEM.steps and losses[-1] < losses[0]  # equal, and not because nothing moves
    assert row.collectives > 0 and "PASS" in verify.table([row])


@pytest.mark.parametrize("layout", LAYOUTS[:QUICK], ids=lambda layout: layout.name)
def test_layout_equals_single_process(runs, layout):
    check(runs, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS[QUICK:], ids=lambda layout: layout.name)
def test_more_layouts_equal_single_process(runs, layout):
    check(runs, layout)


@pytest.fixture
def compiled(runs, tmp_path) -> Path:
    """A copy of a compiled 4-rank layout to spoil."""
    if not (rank_folder(runs / BROKEN.name, 3) / "result.json").exists():
        check(runs, BROKEN)
    return Path(shutil.copytree(runs / BROKEN.name, tmp_path / "spoiled", symlinks=True))


def test_one_wrong_shard_fails(runs, compiled):
    """A weight cut along the wrong device axis: the loss still looks normal, the comparison must not pass."""
    for rank in range(BROKEN.world_size):
        path = rank_folder(compiled, rank) / "compiled.json"
        content = json.loads(path.read_text())
        tensor_map = content["layouts"]["blocks.0.up"]["tensor_map"]
        assert tensor_map == [-1, 0]
        tensor_map[1] = 1  # dp in place of mp
        path.write_text(json.dumps(content))
    launch.run_ranks(compiled, BROKEN.world_size)
    comparison = compare(runs / "single", compiled, BROKEN.world_size)
    assert not comparison.passed
    assert comparison.loss.value > 1e-3
    row = verify.Row(BROKEN, comparison)
    assert "FAIL" in verify.table([row]) and "differs most: loss" in verify.table([row])


def test_rank_that_raises_is_named_and_stops_the_others(compiled, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 20.0)  # the others still load their graphs when rank 2 fails
    (rank_folder(compiled, 2) / "cpu.mindir").unlink()
    with pytest.raises(launch.RankError, match="rank 2 failed first: ValueError: .*does not exist"):
        launch.run_ranks(compiled, BROKEN.world_size)
    stopped = json.loads((rank_folder(compiled, 0) / "failure.json").read_text())
    assert stopped["message"].startswith("rank 0: stopped in ") and "because rank 2: " in stopped["message"]
