"""Run a list of layouts and the single process from the same weights and data, and say which ones agree."""

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mindformers_ext.cpu_parallel import launch
from mindformers_ext.cpu_parallel.compare import Comparison, compare
from mindformers_ext.lowering.deadlock import traffic
from mindformers_ext.rank_compiler.rank_pool import RankJobs, RankPool

MOST_RANKS = 64  # that run at once: a rank waits for the others, so all of a layout do


@dataclass(frozen=True)
class Layout:
    """One way to spread a problem over devices."""

    name: str
    arguments: dict  # of the problem's `build`
    world_size: int
    stages: int = 1
    micro_batches: int = 1
    loss_stage: int = -1  # that knows the loss


@dataclass(frozen=True)
class Problem:
    """What is trained: a module with `LAYOUTS`, `build(**arguments)` and `build_single(steps=...)`.

    `build` returns the training cell of a rank and its inputs (see rank_compiler/compile_rank.py), `build_single`
    that of one process and the inputs of every step (see reference.py). A YAML is one too: run_problem.RunProblem.
    """

    module: str
    python_path: tuple[str, ...]
    steps: int = 5

    def layouts(self) -> dict[str, Layout]:
        """The layouts that the module lists, by name."""
        return {layout.name: layout for layout in importlib.import_module(self.module).LAYOUTS}

    def single_name(self, layout: Layout) -> str:
        """Folder of the single process that a layout is compared with."""
        return "single"

    def single(self, layout: Layout | None, folder: Path, runners: RankPool | None = None) -> None:
        """Run the single process into `folder`."""
        builder = launch.Builder(f"{self.module}:build_single", {"steps": self.steps}, self.python_path)
        launch.run_reference(builder, folder)

    def jobs(self, layout: Layout, folder: Path) -> RankJobs:
        """How all ranks are compiled and lowered."""
        builder = launch.Builder(f"{self.module}:build", layout.arguments, self.python_path)
        return launch.rank_jobs(builder, layout.world_size, folder, layout.stages)

    def run(self, layout: Layout, single: Path, folder: Path, runners: RankPool) -> list[dict]:
        """Run all ranks from the single process's initial parameters and batches; what each wrote to result.json."""
        for name in ("initial.npz", "batches.npz"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to((single / name).resolve())
        return launch.run_ranks(folder, layout.world_size, layout.stages)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    layout: Layout
    comparison: Comparison | None = None
    failure: str = ""  # why there is no comparison
    collectives: int = 0  # of the busiest rank in one step
    bytes: int = 0
    compile_seconds: float = 0.0  # of all ranks together
    step_seconds: float = 0.0  # median over the steps after the first, of the slowest rank

    @property
    def passed(self) -> bool:
        return self.comparison is not None and self.comparison.passed


def verify(problem: Problem, layouts: Sequence[Layout], folder: Path) -> Iterator[Row]:
    """Run the single process and every layout; yields a row as each is done. A layout that fails is a row too.

    The ranks of the next layouts are compiled while those of one run.
    """
    with RankPool(os.cpu_count() or 1) as pool, RankPool(MOST_RANKS) as runners:
        asked: dict[str, RankJobs | Exception] = {}
        for layout in layouts:
            try:
                asked[layout.name] = _submit(pool, problem, layout, folder / layout.name)
            except (ValueError, RuntimeError) as error:
                asked[layout.name] = error
        for layout in layouts:
            try:
                if isinstance(jobs := asked[layout.name], Exception):
                    raise jobs
                single = folder / problem.single_name(layout)
                if not single.exists():
                    problem.single(layout, single, runners)
                yield _row(pool, runners, problem, layout, single, jobs)
            except (ValueError, RuntimeError) as error:
                yield Row(layout, failure=str(error))


def run_layout(problem: Problem, layout: Layout, single: Path, folder: Path) -> Row:
    """Compile, lower, run and compare one layout. Raises what the parts raise."""
    with RankPool(os.cpu_count() or 1) as pool, RankPool(MOST_RANKS) as runners:
        return _row(pool, runners, problem, layout, single, _submit(pool, problem, layout, folder))


def _submit(pool: RankPool, problem: Problem, layout: Layout, folder: Path) -> RankJobs:
    folder.mkdir(parents=True, exist_ok=True)
    jobs = problem.jobs(layout, folder)
    pool.submit(jobs, list(range(layout.world_size)))
    return jobs


def _row(pool: RankPool, runners: RankPool, problem: Problem, layout: Layout, single: Path, jobs: RankJobs) -> Row:
    """The row of a layout whose ranks were submitted."""
    compiled = list(pool.results(jobs, list(range(layout.world_size))))
    totals = [traffic(calls).values() for calls in launch.lowered(jobs, compiled)]
    results = problem.run(layout, single, jobs.out, runners)
    return Row(
        layout,
        compare(single, jobs.out, layout.world_size, layout.stages, layout.micro_batches, layout.loss_stage),
        collectives=max(sum(count for count, _ in total) for total in totals),
        bytes=max(sum(size for _, size in total) for total in totals),
        compile_seconds=sum(rank.seconds for rank in compiled),
        step_seconds=max(median(result["seconds"][1:]) for result in results),
    )


COLUMNS = tuple(
    ["layout", "ranks", "result", "loss", "grad_norm", "parameter", "collectives", "KB/step", "s/step", "compile_s"]
)


def table(rows: Sequence[Row]) -> str:
    """The rows as text; differences are the largest relative ones."""
    widths = column_widths(row.layout for row in rows)
    return "\n".join([line(COLUMNS, widths), *(text_of(row, widths) for row in rows)])


def column_widths(layouts: Iterable[Layout]) -> list[int]:
    """Widths of the columns, which are known before the first row."""
    return [max(len(layout.name) for layout in layouts), *(max(len(name), 7) for name in COLUMNS[1:])]


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells side by side."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def text_of(row: Row, widths: Sequence[int]) -> str:
    """A row, and below it its losses, where it differs most, or why it failed."""
    return "\n".join([line(_cells(row), widths), *_notes(row)])


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "PASS" if row.passed else "FAIL"
    if row.comparison is None:
        return (row.layout.name, str(row.layout.world_size), verdict) + ("-",) * (len(COLUMNS) - 3)
    differences = (row.comparison.loss, row.comparison.gradient_norm, row.comparison.parameter)
    numbers = [f"{difference.value:.1e}" for difference in differences]
    cost = [str(row.collectives), f"{row.bytes / 1024:.0f}", f"{row.step_seconds:.3f}", f"{row.compile_seconds:.0f}"]
    return (row.layout.name, str(row.layout.world_size), verdict, *numbers, *cost)


def _notes(row: Row) -> Iterator[str]:
    if row.failure:
        yield f"{row.layout.name}: {row.failure}"
    if row.comparison is not None:
        yield f"{row.layout.name} losses: " + " ".join(f"{loss:.6f}" for loss in row.comparison.losses)
    if row.comparison is not None and not row.passed:
        found = row.comparison
        yield f"{row.layout.name} single: " + " ".join(f"{loss:.6f}" for loss in found.single_losses)
        places = {"loss": found.loss, "gradient norm": found.gradient_norm, "parameter": found.parameter}
        worst = "; ".join(f"{what} {where.value:.1e} at {where.name}" for what, where in places.items())
        copies = f"; copies of {found.replica.name} differ by {found.replica.value:.1e}" if found.replica.value else ""
        yield f"{row.layout.name} differs most: {worst}{copies}"
