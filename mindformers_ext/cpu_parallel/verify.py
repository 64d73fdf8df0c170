"""Run a list of layouts and the single process from the same weights and data, and say which ones agree."""

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from mindformers_ext.cpu_parallel import launch
from mindformers_ext.cpu_parallel.compare import Comparison, compare
from mindformers_ext.lowering.calls import Call
from mindformers_ext.lowering.deadlock import traffic


@dataclass(frozen=True)
class Layout:
    """One way to spread a problem over devices."""

    name: str
    arguments: dict  # of the problem's `build`
    world_size: int
    stages: int = 1
    micro_batches: int = 1


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

    def single(self, layout: Layout | None, folder: Path) -> None:
        """Run the single process into `folder`."""
        builder = launch.Builder(f"{self.module}:build_single", {"steps": self.steps}, self.python_path)
        launch.run_reference(builder, folder)

    def compile(self, layout: Layout, folder: Path) -> list[list[Call]]:
        """Compile and lower all ranks; returns their collectives."""
        builder = launch.Builder(f"{self.module}:build", layout.arguments, self.python_path)
        return launch.compile_ranks(builder, layout.world_size, folder, layout.stages)

    def run(self, layout: Layout, single: Path, folder: Path) -> list[dict]:
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
    compile_seconds: float = 0.0
    step_seconds: float = 0.0  # median over the steps after the first, of the slowest rank

    @property
    def passed(self) -> bool:
        return self.comparison is not None and self.comparison.passed


def verify(problem: Problem, layouts: Sequence[Layout], folder: Path) -> Iterator[Row]:
    """Run the single process, then every layout; yields a row as each is done. A layout that fails is a row too."""
    for layout in layouts:
        single = folder / problem.single_name(layout)
        try:
            if not single.exists():
                problem.single(layout, single)
            yield run_layout(problem, layout, single, folder / layout.name)
        except (ValueError, RuntimeError) as error:
            yield Row(layout, failure=str(error))


def run_layout(problem: Problem, layout: Layout, single: Path, folder: Path) -> Row:
    """Compile, lower, run and compare one layout. Raises what the parts raise."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    sequences = problem.compile(layout, folder)
    compile_seconds = time.perf_counter() - started
    results = problem.run(layout, single, folder)
    totals = [traffic(calls).values() for calls in sequences]
    return Row(
        layout,
        compare(single, folder, layout.world_size, layout.stages, layout.micro_batches),
        collectives=max(sum(count for count, _ in total) for total in totals),
        bytes=max(sum(size for _, size in total) for total in totals),
        compile_seconds=compile_seconds,
        step_seconds=max(median(result["seconds"][1:]) for result in results),
    )


COLUMNS = tuple(
    ["layout", "ranks", "result", "loss", "grad_norm", "parameter", "collectives", "KB/step", "s/step", "compile_s"]
)


def table(rows: Sequence[Row]) -> str:
    """The rows as text: differences are the largest relative ones; below it, where the worst are and what failed."""
    lines = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(text + [note for row in rows for note in _notes(row)])


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
