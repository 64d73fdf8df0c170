"""Cut full parameters into the shards of a rank, and put shards together again.

A layout is one entry of `compiled.json` (rank_compiler/compile_rank.py): the device matrix of the ranks of a
pipeline stage, slowest axis first, and for every tensor dimension the axis that splits it, counted from the last
(-1: whole). A parameter stored smaller than its slice is cut once more along dimension 0 by optimizer parallelism.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
# the optimizers' first moments, of MindSpore's AdamWeightDecay and MindFormers' AdamW, and of Muon.
FIRST_MOMENTS = ("adam_m.", "exp_avg.", "muon_m.")


Ranges = tuple[tuple[int, int], ...]  # half-open, one for every dimension


@dataclass(frozen=True)
class Slot:
    """The part of a parameter that one rank holds; `copy` counts the stage's ranks before it with the same part."""

    full_shape: tuple[int, ...]
    ranges: Ranges
    copy: int = 0

    @classmethod
    def whole(cls, shape: Iterable[int], copy: int = 0) -> "Slot":
        """The whole parameter."""
        shape = tuple(shape)
        return cls(shape, tuple((0, size) for size in shape), copy)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(end - begin for begin, end in self.ranges)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What cuts the part from the whole."""
        return tuple(slice(begin, end) for begin, end in self.ranges)

    def cut(self, full: np.ndarray) -> np.ndarray:
        return np.array(full[self.slices], order="C")  # a copy, 0-d stays 0-d


def shard_of(name: str, full_shape: Sequence[int], stored_shape: Sequence[int], layout: Mapping, index: int) -> Slot:
    """What the stage's `index`-th device stores of parameter `name`.

    Raises ValueError when the stored shape does not follow from the layout.
    """
    matrix, tensor_map = layout["device_matrix"], layout["tensor_map"]
    axes = [len(matrix) - 1 - axis if axis >= 0 else None for axis in tensor_map]

    def position(device: int) -> tuple[int, ...]:
        place = np.unravel_index(device, tuple(matrix))
        return tuple(0 if axis is None else int(place[axis]) for axis in axes)

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
    slot = Slot(tuple(full_shape), tuple(ranges), copy)
    if slot.shape != tuple(stored_shape):
        raise ValueError(
            f"parameter '{name}' is stored as {tuple(stored_shape)}, its layout cuts {slot.full_shape} to {slot.shape} "
            f"on device {index} of its stage"
        )
    return slot


def optimizer_ways(rows: int, size: int, copies: int, shard_size: int, threshold: int) -> int:
    """Over how many ranks optimizer parallelism splits a rank's part of a weight along its first axis (1: not at all).

    `rows` are that axis' length on the rank, `size` the whole weight's bytes, `copies` the ranks that hold the part.
    """
    ways = copies if shard_size == -1 else min(shard_size, copies)
    return 1 if size < threshold or copies % ways or rows % ways else ways


def slot_of(
    name: str,
    stored_shape: Sequence[int],
    layout: Mapping | None,
    index: int,
    full_shape: Sequence[int] | None = None,
) -> Slot:
    """What the stage's `index`-th device holds of a parameter or optimizer state: its layout's part, or else all.

    `full_shape` is the layout's, unless it is known otherwise. Raises ValueError as shard_of does.
    """
    if layout is None or len(layout["tensor_map"]) != len(stored_shape):
        return Slot.whole(stored_shape if full_shape is None else full_shape, copy=index)
    return shard_of(name, layout["full_shape"] if full_shape is None else full_shape, stored_shape, layout, index)


def layout_for(name: str, layouts: Mapping[str, Mapping]) -> Mapping | None:
    """Layout of a parameter or of an optimizer state named after one."""
    return layouts.get(owner_of(name, layouts))


def owner_of(name: str, known: Container[str]) -> str | None:
    """The known parameter that `name` is, or is named after (`adam_m.<weight>`, `accu_grads.<weight>`)."""
    while name and name not in known:
        name = name.partition(".")[2]
    return name or None


def gather(
    name: str, full_shape: Sequence[int], slots: Sequence[tuple[int, Slot, np.ndarray]]
) -> tuple[np.ndarray, float]:
    """The full parameter from (rank, slot, array) of all ranks that store a part of it.

    Returns it and the largest absolute difference between replicas of the same part (0 when they are equal).
    Raises ValueError when a part is missing.
    """
    full = np.zeros(full_shape, slots[0][2].dtype)
    filled = np.zeros(full_shape, bool)
    difference = 0.0
    for rank, slot, part in slots:
        if part.shape != slot.shape:
            raise ValueError(f"parameter '{name}': rank {rank} stores {part.shape}, not {slot.ranges}")
        known = slot.cut(filled)
        if known.any():
            other = slot.cut(full)[known].astype(np.float64) - part[known].astype(np.float64)
            difference = max(difference, float(np.abs(other).max()))
        full[slot.slices], filled[slot.slices] = part, True
    if not filled.all():
        raise ValueError(f"parameter '{name}': {int((~filled).sum())} of {filled.size} elements are on no rank")
    return full, difference
