"""Compare a run of several ranks with the single process: losses, gradient norms, gathered parameters."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from mindformers_ext.cpu_parallel.run_rank import rank_folder
from mindformers_ext.sharded_checkpoint.shards import FIRST_MOMENTS, gather, layout_for, slot_of

LOSS_LIMIT = 1e-5
PARAMETER_LIMIT = 1e-4


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of some quantity, and where it is."""

    value: float
    name: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `passed` applies the limits."""

    losses: list[float]
    single_losses: list[float]
    loss: Difference
    gradient_norm: Difference
    parameter: Difference
    replica: Difference  # between the copies of one part on different ranks, absolute

    @property
    def passed(self) -> bool:
        return (
            self.loss.value <= LOSS_LIMIT
            and self.gradient_norm.value <= PARAMETER_LIMIT
            and self.parameter.value <= PARAMETER_LIMIT
            and self.replica.value == 0
        )


def relative(value: np.ndarray, reference: np.ndarray, where: np.ndarray | bool = True) -> float:
    """Largest absolute difference over the largest absolute value of the reference; NaN counts as infinite."""
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0, where=where)
    scale = np.abs(reference.astype(np.float64)).max(initial=0.0)
    ratio = difference / scale if scale > 0 else difference
    return float(ratio) if np.isfinite(ratio) else float("inf")


def compare(
    single: Path, folder: Path, world_size: int, stages: int = 1, micro_batches: int = 1, loss_stage: int = -1
) -> Comparison:
    """Compare the ranks' results in `folder` with the single process's in `single`.

    The loss is the first scalar output of a step; MindSpore's pipeline returns its sum over the micro-batches.
    Elements that some step of the single process moved by rounding only (certain_elements.py) are not compared.
    Raises ValueError when a parameter of the single process is on no rank, or ranks of the stage that knows the loss
    disagree about it.
    """
    reference = [out[0] for out in json.loads((single / "result.json").read_text())["outputs"]]
    losses = [loss / micro_batches for loss in stage_losses(folder, world_size, stages, loss_stage)]
    per_step = [relative(np.array(a), np.array(b)) for a, b in zip(losses, reference, strict=True)]
    worst_step = int(np.argmax(per_step))
    with np.load(single / "certain.npz") as certain:

        def difference(name: str, value: np.ndarray, reference: np.ndarray) -> float:
            where = [certain[f"{kind}{name}"] for kind in FIRST_MOMENTS if f"{kind}{name}" in certain.files]
            return relative(value, reference, where[0] if where else True)

        found = _differences(single, folder, "final.npz", world_size, stages, difference)
        parameters, replicas = zip(*found, strict=True)
    norms, _ = zip(*_differences(single, folder, "moments.npz", world_size, stages, _norm_difference), strict=True)
    return Comparison(
        losses=losses,
        single_losses=reference,
        loss=Difference(per_step[worst_step], f"step {worst_step + 1}"),
        gradient_norm=max(norms, key=attrgetter("value")),
        parameter=max(parameters, key=attrgetter("value")),
        replica=max(replicas, key=attrgetter("value")),
    )


def stage_losses(folder: Path, world_size: int, stages: int, stage: int = -1) -> list[float]:
    """The loss of every step, which only the ranks of one pipeline stage know, mostly the last."""
    first = stage % stages * (world_size // stages)
    losses = {}
    for rank in range(first, first + world_size // stages):
        outputs = json.loads((rank_folder(folder, rank) / "result.json").read_text())["outputs"]
        losses[rank] = [out[0] for out in outputs]
    for rank, values in losses.items():
        if values != losses[first]:
            raise ValueError(f"ranks {first} and {rank} report different losses: {losses[first]} and {values}")
    return losses[first]


def gathered(
    single: Path, folder: Path, file: str, world_size: int, stages: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, float]]:
    """(name, gathered value, the single process's value, difference of replicas) of every parameter in `file`."""
    compiled = [json.loads((rank_folder(folder, r) / "compiled.json").read_text()) for r in range(world_size)]
    stored = [np.load(rank_folder(folder, r) / file) for r in range(world_size)]
    per_stage = world_size // stages
    with np.load(single / file) as reference:
        for name in reference.files:
            full = reference[name]
            slots = []
            for rank in range(world_size):
                if name not in stored[rank].files:
                    continue
                part = stored[rank][name]
                layout = layout_for(name, compiled[rank]["layouts"])
                slots.append((rank, slot_of(name, part.shape, layout, rank % per_stage, full.shape), part))
            if slots:
                value, replicas = gather(name, full.shape, slots)
                yield name, value, full, replicas
            elif not is_run_state(name):
                raise ValueError(f"parameter '{name}' of the single process is on no rank")


def is_run_state(name: str) -> bool:
    """True for the few scalars (learning rates and the like) that a graph may keep as constants."""
    return "." not in name


def _differences(single, folder, file, world_size, stages, measure) -> Iterator[tuple[Difference, Difference]]:
    for name, value, reference, replicas in gathered(single, folder, file, world_size, stages):
        yield Difference(measure(name, value, reference), name), Difference(replicas, name)


def _norm_difference(name: str, value: np.ndarray, reference: np.ndarray) -> float:
    return relative(np.linalg.norm(value.astype(np.float64)), np.linalg.norm(reference.astype(np.float64)))
