"""A small model goes on in another layout from a checkpoint, with the losses of the single process."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cpu_parallel import launch, verify
from mindformers_ext.cpu_parallel.compare import stage_losses
from mindformers_ext.cpu_parallel.run_rank import rank_folder, read_batches, write_batches
from mindformers_ext.rank_compiler.rank_pool import compile_ranks
from mindformers_ext.sharded_checkpoint.layout import Meta, Piece, compiled_slots
from mindformers_ext.sharded_checkpoint.reader import check_names, load, open_source
from mindformers_ext.sharded_checkpoint.writer import Saver

TESTS = Path(__file__).parents[1]
PYTHON_PATH = (str(TESTS.parent), str(TESTS), str(TESTS.parent / "research" / "deepseek3"))
STEPS = 2  # before the change, and after it
TRANSFORMER, DEEPSEEK = (
    verify.Problem(f"cpu_parallel.{name}", PYTHON_PATH, steps=2 * STEPS)
    for name in ("toy_transformer", "small_deepseek")
)
PAIRS = [
    (TRANSFORMER, "dp2-mp2-optimizer", "pp2"),
    (TRANSFORMER, "pp2", "mp2"),
    (TRANSFORMER, "pp2-chunks2", "dp2-mp2-optimizer"),
    (TRANSFORMER, "mp2", "pp2-zero_bubble_v"),
    (TRANSFORMER, "pp2-zero_bubble_v", "pp2-chunks2"),
    (DEEPSEEK, "dp2-optimizer", "mp2"),
    (DEEPSEEK, "mp2", "ep2"),
    (DEEPSEEK, "ep2", "dp2-optimizer"),
]


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Where the runs of every problem lie."""
    return tmp_path_factory.mktemp("layout_change")


def single_run(problem: verify.Problem, root: Path) -> Path:
    """The folder of the single process, which is run when it is asked for first."""
    folder = root / problem.module / "single"
    if not folder.exists():
        problem.single(None, folder)
    return folder


def compiled_folder(problem: verify.Problem, single: Path, layout: verify.Layout) -> Path:
    """The folder of a layout's ranks, compiled when it is asked for first."""
    folder = single.parent / layout.name
    if not folder.exists():
        folder.mkdir(parents=True)
        jobs = problem.jobs(layout, folder)
        launch.lowered(jobs, compile_ranks(jobs, list(range(layout.world_size)), workers=2))
    return folder


def train(folder: Path, layout: verify.Layout, initial: dict[str, np.ndarray], batches: list) -> list[float]:
    """Train from full parameters; returns the losses, and leaves every rank's parameters in final.npz."""
    np.savez(folder / "initial.npz", **initial)
    write_batches(folder, batches)
    launch.run_ranks(folder, layout.world_size, layout.stages)
    losses = stage_losses(folder, layout.world_size, layout.stages, layout.loss_stage)
    return [loss / layout.micro_batches for loss in losses]


def slots(folder: Path, rank: int) -> dict:
    return compiled_slots(json.loads((rank_folder(folder, rank) / "compiled.json").read_text()))


def save(folder: Path, layout: verify.Layout, root: Path) -> None:
    """Every rank saves what it holds."""
    for rank in reversed(range(layout.world_size)):
        with np.load(rank_folder(folder, rank) / "final.npz") as final:
            pieces = {name: Piece(final[name], slot) for name, slot in slots(folder, rank).items()}
        Saver(root, rank, layout.world_size).save(Meta(STEPS, layout.world_size), pieces)


@pytest.mark.slow
@pytest.mark.parametrize("problem,origin,target", PAIRS, ids=[f"{a}-to-{b}" for _, a, b in PAIRS])
def test_training_goes_on_in_another_layout(root, tmp_path, problem: verify.Problem, origin: str, target: str) -> None:
    first, second = (problem.layouts()[name] for name in (origin, target))
    single = single_run(problem, root)
    with np.load(single / "initial.npz") as stored:
        initial = {name: stored[name] for name in stored.files}
    batches = read_batches(single)
    folder = compiled_folder(problem, single, first)
    losses = train(folder, first, initial, batches[:STEPS])
    save(folder, first, tmp_path)

    source = open_source(tmp_path)
    folder = compiled_folder(problem, single, second)
    whole = {name: source.read(name)[...] for name in source.names()}
    for rank in range(second.world_size):
        own = slots(folder, rank)
        check_names(source, own, whole_model=False)
        for name, part in load(source, own):
            cuts = tuple(slice(begin, end) for begin, end in own[name].ranges)
            np.testing.assert_array_equal(part, whole[name][cuts], err_msg=name)
    losses += train(folder, second, initial | whole, batches[STEPS:])

    expected = [output[0] for output in json.loads((single / "result.json").read_text())["outputs"]]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] and "global_step" in whole
