"""What a checkpoint holds, whether it is undamaged, and in what two checkpoints differ."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mindformers_ext.sharded_checkpoint.reader import Checkpoint, Readable, Source
from mindformers_ext.sharded_checkpoint.shards import Slot

CHUNK_VALUES = 2**24  # values that are compared at a time


@dataclass(frozen=True)
class Row:
    """One parameter: how it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    parts: int  # files that hold a part of it
    split: tuple[int, ...]  # parts along every dimension


@dataclass(frozen=True)
class Difference:
    """In what a parameter differs between two checkpoints; `largest` is absolute, None when values do not compare."""

    name: str
    what: str
    largest: float | None = None


def rows(source: Source) -> list[Row]:
    """One row for every parameter, by name."""
    found = []
    for name in sorted(source.names()):
        parameter = source.read(name)
        ranges = [Slot.whole(parameter.shape).ranges]
        if isinstance(source, Checkpoint):
            ranges = [piece.ranges for piece in source.layout.entries[name].pieces]
        split = tuple(len({ends[axis] for ends in ranges}) for axis in range(len(parameter.shape)))
        size = int(np.prod(parameter.shape)) * parameter.dtype.itemsize
        found.append(Row(name, parameter.dtype.name, tuple(parameter.shape), size, len(ranges), split))
    return found


def verify_all(source: Checkpoint) -> None:
    """Check every byte of a checkpoint. Raises ConfigError that names what is damaged."""
    source.verify({name: Slot.whole(source.read(name).shape) for name in source.names()})


def differences(first: Source, second: Source) -> Iterator[Difference]:
    """Every parameter that is not the same in both, bit for bit, by name."""
    ours, theirs = set(first.names()), set(second.names())
    for name in sorted(ours | theirs):
        if name not in theirs or name not in ours:
            yield Difference(name, "only in the first" if name in ours else "only in the second")
            continue
        a, b = first.read(name), second.read(name)
        if tuple(a.shape) != tuple(b.shape):
            yield Difference(name, f"shape {tuple(a.shape)} and {tuple(b.shape)}")
        elif a.dtype != b.dtype:
            yield Difference(name, f"type {a.dtype} and {b.dtype}", largest_difference(a, b))
        elif not same_bits(a, b):
            yield Difference(name, "values", largest_difference(a, b))


def chunks(parameter: Readable) -> Iterator[slice]:
    """Cuts of the first dimension, so that no more than CHUNK_VALUES (or one row) are in memory."""
    count = parameter.shape[0]
    row = max(int(np.prod(parameter.shape[1:])), 1)
    step = max(CHUNK_VALUES // row, 1)
    for begin in range(0, count, step):
        yield slice(begin, min(begin + step, count))


def same_bits(a: Readable, b: Readable) -> bool:
    """True when two parameters of one shape and type hold the same bytes."""
    if not a.shape:
        return a[()].tobytes() == b[()].tobytes()
    return all(a[cut].tobytes() == b[cut].tobytes() for cut in chunks(a))


def largest_difference(a: Readable, b: Readable) -> float:
    """Largest absolute difference of two parameters of one shape; NaN when either holds one."""
    cuts = chunks(a) if a.shape else [()]
    found = [np.abs(a[cut].astype(np.float64) - b[cut].astype(np.float64)).max(initial=0.0) for cut in cuts]
    return float(max(found, default=0.0))
