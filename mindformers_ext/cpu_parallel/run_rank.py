"""Run one rank's lowered graph for some steps: the worker process that `launch.run_ranks` starts N times.

The environment has the job's name, which other users of the machine must not see as they see arguments.
Reads from the run folder: `initial.npz` (full parameters and optimizer states), `batches.npz` (the global batch of
every step) and, per rank, `cpu.mindir` and `compiled.json`. Writes per rank `final.npz` (stored parameters after the
last step), `moments.npz` and `certain.npz` (see `train`) and `result.json`; when it fails, it stops the other ranks and
writes `failure.json` with one sentence.
"""

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mindformers_ext.collectives import collectives
from mindformers_ext.collectives.rank_job import JOB
from mindformers_ext.errors import of_files
from mindformers_ext.files.atomic import write_json
from mindformers_ext.sharded_checkpoint.shards import FIRST_MOMENTS, GRADIENT_BUFFERS, layout_for, slot_of
from mindformers_ext.training.certain_elements import CertainElements

UNSUPPORTED = re.compile(r"(?:Unsupported op|kernel) \[?'?(\w+)\]?'? (?:on|is not)", re.IGNORECASE)


def rank_folder(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}"


def read_batches(folder: Path) -> list[list[np.ndarray]]:
    """Inputs of every step, in order."""
    with np.load(folder / "batches.npz") as stored:
        steps = 1 + max(int(name.split("_")[0]) for name in stored.files)
        width = len(stored.files) // steps
        return [[stored[f"{step}_{i}"] for i in range(width)] for step in range(steps)]


def write_batches(folder: Path, batches: list) -> None:
    np.savez(folder / "batches.npz", **{f"{s}_{i}": x for s, batch in enumerate(batches) for i, x in enumerate(batch)})


def load_graph(path: Path):
    """The lowered graph as a cell."""
    import mindspore as ms
    from mindspore import nn

    return nn.GraphCell(ms.load(str(path)))


def set_parameters(cell, initial, compiled: dict, index: int) -> None:
    """Give every parameter of the graph this device's part of its full initial value."""
    from mindspore import Tensor

    for parameter in cell.get_parameters():
        name = parameter.name
        if name in initial:
            full, layout = initial[name], layout_for(name, compiled["layouts"])
            value = slot_of(name, parameter.shape, layout, index, full.shape).cut(full)
        elif name.startswith(GRADIENT_BUFFERS):
            value = np.zeros(parameter.shape)
        else:
            raise ValueError(f"parameter '{name}' {tuple(parameter.shape)} of the graph has no initial value")
        if tuple(value.shape) != tuple(parameter.shape):
            raise ValueError(f"parameter '{name}' is stored as {tuple(parameter.shape)}, its value is {value.shape}")
        parameter.set_data(Tensor(value, parameter.dtype))


def values(cell, prefixes: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
    """The parameters whose names start with one of `prefixes`."""
    return {p.name: p.asnumpy() for p in cell.get_parameters() if p.name.startswith(prefixes)}


def train(cell, batches: list, folder: Path) -> tuple[list[list[float]], list[float]]:
    """Run all steps; returns the scalar outputs and the seconds of every step.

    Writes `moments.npz`, the optimizer's first moments after the first step, which then are the gradients times
    (1 - beta1), and `certain.npz` (CertainElements).
    """
    from mindspore import Tensor

    certain = CertainElements()
    types = [Tensor(x).dtype for x in batches[0]]
    outputs, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        result = cell(*(Tensor(x, dtype) for x, dtype in zip(batch, types, strict=True)))
        made = result if isinstance(result, tuple) else (result,)
        outputs.append([float(v.asnumpy()) for v in made if v.size == 1])
        seconds.append(time.perf_counter() - start)
        moments = values(cell, FIRST_MOMENTS)
        certain.note(moments)
        if len(seconds) == 1:
            np.savez(folder / "moments.npz", **moments)
    certain.save(folder / "certain.npz")
    return outputs, seconds


def run(folder: Path, rank: int, world_size: int, stages: int) -> None:
    """All steps of one rank; the job is joined already."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    own = rank_folder(folder, rank)
    start = time.perf_counter()
    cell = load_graph(own / "cpu.mindir")
    compiled = json.loads((own / "compiled.json").read_text())
    with np.load(folder / "initial.npz") as initial:
        set_parameters(cell, initial, compiled, rank % (world_size // stages))
    outputs, seconds = train(cell, read_batches(folder), own)
    np.savez(own / "final.npz", **values(cell))
    total = time.perf_counter() - start
    result = {"rank": rank, "outputs": outputs, "seconds": seconds, "total_seconds": total}
    (own / "result.json").write_text(json.dumps(result))


def sentence(error: BaseException) -> str:
    """What went wrong, in one sentence: the collective's own, the operator that CPU lacks, or the exception."""
    from_collective = collectives.last_error()
    if from_collective:
        return from_collective
    if isinstance(error, OSError) and (refused := of_files(error)):
        return refused
    text = str(error).strip()
    missing = UNSUPPORTED.search(text)
    if missing:
        return (
            f"CPU MindSpore has no kernel for operator '{missing.group(1)}': add its rewriting to REWRITES in "
            f"mindformers_ext/lowering/lower.py ({text.splitlines()[0]})"
        )
    lines = [line for line in text.splitlines() if line.strip("- ")]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def as_rank(job: str, rank: int, world_size: int, failure: Path, work: Callable[[], None]) -> None:
    """Join the job, do the work and leave; when anything fails, stop the other ranks, say why in `failure` and end.

    A failed process ends at once, with code 1: MindSpore's own end would wait for threads that a failed step holds.
    """
    try:
        collectives.join(job, rank, world_size)
        work()
        collectives.leave()
    except Exception as error:
        message = sentence(error)
        collectives.abort(message)
        traceback.print_exc()
        write_json(failure, {"rank": rank, "message": message, "time": time.time()})
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world_size", type=int, required=True)
    parser.add_argument("--stages", type=int, default=1)
    args = parser.parse_args()
    failure = rank_folder(args.folder, args.rank) / "failure.json"
    work = partial(run, args.folder, args.rank, args.world_size, args.stages)
    as_rank(os.environ[JOB], args.rank, args.world_size, failure, work)


if __name__ == "__main__":
    main()
