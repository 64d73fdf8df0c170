"""Cut full parameters into the shards of a rank, and put shards together again.

A layout is one entry of `compiled.json` (rank_compiler/compile_rank.py): the device matrix of the ranks of a
pipeline stage, slowest axis first, and for every tensor dimension the axis that splits it, counted from the last
(-1: whole). A parameter stored smaller than its slice is cut once more along dimension 0 by optimizer parallelism.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

# Fields of one entry of MindSpore 2.9.0's `cell.parameter_layout_dict`, in its order.
LAYOUT_FIELDS = (
    "device_matrix",  # sizes of the device axes, slowest first
    "tensor_map",  # per dimension: device axis counted from the last (0), -1 where it is not split
    "slice_shape",  # this rank's shape, before optimizer parallelism splits dimension 0 further
    "field_size",
    "uniform_split",
    "optimizer_shard_group",  # name of the communication group of optimizer parallelism, "" without
    "full_shape",
    "after_slice_shape",
    "pipeline_shared",
    "pipeline_send",
    "pipeline_peer",
    "pipeline_tag",
)
# How the names of these begin: gradient buffers of accumulation and pipelines, zero when a step starts;
GRADIENT_BUFFERS = ("accu_grads.",)
# the optimizers' first moments, of MindSpore's AdamWeightDecay and MindFormers' AdamW.
FIRST_MOMENTS = ("adam_m.", "exp_avg.")


@dataclass(frozen=True)
class Shard:
    """Where one rank's stored array lies in the full parameter: half-open ranges, one per dimension.

    `copy` counts the ranks of the stage before this one that store the same part.
    """

    ranges: tuple[tuple[int, int], ...]
    copy: int = field(default=0, compare=False)

    def cut(self, full: np.ndarray) -> np.ndarray:
        return np.array(full[tuple(slice(a, b) for a, b in self.ranges)], order="C")  # a copy, 0-d stays 0-d

    def put(self, full: np.ndarray, part: np.ndarray) -> None:
        full[tuple(slice(a, b) for a, b in self.ranges)] = part


def coordinates(index: int, device_matrix: Sequence[int]) -> tuple[int, ...]:
    """Place of the stage's `index`-th device on every axis, slowest first."""
    return tuple(int(c) for c in np.unravel_index(index, tuple(device_matrix)))


def shard_of(name: str, full_shape: Sequence[int], stored_shape: Sequence[int], layout: Mapping, index: int) -> Shard:
    """What the stage's `index`-th device stores of parameter `name`.

    Raises ValueError when the stored shape does not follow from the layout.
    """
    matrix, tensor_map = layout["device_matrix"], layout["tensor_map"]
    axes = [len(matrix) - 1 - axis if axis >= 0 else None for axis in tensor_map]

    def position(device: int) -> tuple[int, ...]:
        place = coordinates(device, matrix)
        return tuple(0 if axis is None else place[axis] for axis in axes)

    own = position(index)
    parts = [1 if axis is None else matrix[axis] for axis in axes]
    ranges = []
    for size, part, place in zip(full_shape, parts, own, strict=True):
        if size % part:
            raise ValueError(f"parameter '{name}': {size} does not divide by {part} (layout {dict(layout)})")
        ranges.append((size // part * place, size // part * (place + 1)))
    copy = [device for device in range(prod(matrix)) if position(device) == own].index(index)
    if ranges and ranges[0][1] - ranges[0][0] != stored_shape[0]:
        begin, end = ranges[0]
        copy, piece = divmod(copy, (end - begin) // stored_shape[0])
        begin += piece * stored_shape[0]
        ranges[0] = (begin, begin + stored_shape[0])
    if tuple(b - a for a, b in ranges) != tuple(stored_shape):
        raise ValueError(
            f"parameter '{name}' is stored as {tuple(stored_shape)}, its layout cuts {tuple(full_shape)} to "
            f"{tuple(b - a for a, b in ranges)} on device {index} of its stage"
        )
    return Shard(tuple(ranges), copy)


def stored_part(
    name: str, full_shape: Sequence[int], stored_shape: Sequence[int], layouts: Mapping, index: int
) -> Shard:
    """What the stage's `index`-th device stores of a parameter or optimizer state: its layout's part, or else all."""
    layout = layout_for(name, layouts)
    if layout is None or len(layout["tensor_map"]) != len(full_shape):
        return Shard(tuple((0, size) for size in full_shape), copy=index)
    return shard_of(name, full_shape, stored_shape, layout, index)


def layout_for(name: str, layouts: Mapping[str, Mapping]) -> Mapping | None:
    """Layout of a parameter or of an optimizer state named after one."""
    return layouts.get(owner_of(name, layouts))


def owner_of(name: str, known: Container[str]) -> str | None:
    """The known parameter that `name` is, or is named after (`adam_m.<weight>`, `accu_grads.<weight>`)."""
    while name and name not in known:
        name = name.partition(".")[2]
    return name or None


def gather(
    name: str, full_shape: Sequence[int], shards: Sequence[tuple[int, Shard, np.ndarray]]
) -> tuple[np.ndarray, float]:
    """The full parameter from (rank, shard, array) of all ranks that store a part of it.

    Returns it and the largest absolute difference between replicas of the same part (0 when they are equal).
    Raises ValueError when a part is missing.
    """
    full = np.zeros(full_shape, shards[0][2].dtype)
    filled = np.zeros(full_shape, bool)
    difference = 0.0
    for rank, shard, part in shards:
        if part.shape != tuple(b - a for a, b in shard.ranges):
            raise ValueError(f"parameter '{name}': rank {rank} stores {part.shape}, not {shard.ranges}")
        known = shard.cut(filled)
        if known.any():
            other = shard.cut(full)[known].astype(np.float64) - part[known].astype(np.float64)
            difference = max(difference, float(np.abs(other).max()))
        shard.put(full, part)
        shard.put(filled, np.ones(part.shape, bool))
    if not filled.all():
        raise ValueError(f"parameter '{name}': {int((~filled).sum())} of {filled.size} elements are on no rank")
    return full, difference
