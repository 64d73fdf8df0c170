"""Read any part of any parameter of a checkpoint, whatever layout it was saved in.

A `Source` gives parameters by our names; `load` reads the parts that one rank holds. Only what is asked for is read,
one parameter at a time, after everything that it touches has been checked: a damaged or unfitting checkpoint is
refused before the first value is used.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from tqdm import tqdm

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.json_files import convert
from mindformers_ext.files.safetensors_format import DTYPES, StoredTensor, read_folder, read_header
from mindformers_ext.sharded_checkpoint.layout import (
    AVERAGE,
    BLOCK_BYTES,
    FORMAT,
    Entry,
    Layout,
    Meta,
    StoredPiece,
    intersect,
    is_weight,
    read_signed_json,
)
from mindformers_ext.sharded_checkpoint.shards import Ranges, Slot
from mindformers_ext.sharded_checkpoint.writer import LATEST, rank_file, saved_steps

PLAIN_INDEX = "model.safetensors.index.json"
SHOWN = 3  # names in a sentence


class Readable(Protocol):
    """A parameter that reads what it is asked for: `parameter[2:4, :]`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray: ...

    def stored(self) -> Iterator[StoredTensor]:
        """The tensors in files that it is made of."""


class Source(Protocol):
    """Parameters by our names, from a checkpoint of any kind."""

    path: Path

    def names(self) -> Iterable[str]:
        """Names of all parameters."""

    def read(self, name: str) -> Readable:
        """A parameter; nothing is read until it is indexed. Raises KeyError."""


class PlainFiles:
    """Whole parameters in one safetensors file, or in a folder of them; no checksums."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors = read_folder(path, PLAIN_INDEX) if path.is_dir() else read_header(path)[0]

    def names(self) -> Iterable[str]:
        return self.tensors.keys()

    def read(self, name: str) -> StoredTensor:
        return self.tensors[name]


class Checkpoint:
    """A saved step.

    Args:
        folder: `.../step_000100`.

    Raises:
        ConfigError: a file is missing or of another size, or what describes the checkpoint is damaged.
    """

    def __init__(self, folder: Path):
        self.path = folder
        content = read_signed_json(folder / "meta.json")
        if content.get("format") != FORMAT:
            raise ConfigError(f"{folder}: has format {content.get('format')}, but this program reads {FORMAT}")
        self.meta = convert(content, Meta, folder / "meta.json")
        self.layout = Layout.from_json(read_signed_json(folder / "layout.json"), folder / "layout.json")
        try:
            self.meta.check()
            self.layout.check(self.meta.ranks)
        except ValueError as error:
            raise ConfigError(f"{folder}: damaged: {error}; use another checkpoint") from None
        self._parts: dict[int, dict[str, StoredTensor]] = {}  # by rank, opened when they are asked for
        self._private: dict[int, dict[str, Any]] = {}
        self._held: dict[int, list[tuple[str, tuple[int, ...]]]] = {rank: [] for rank in self.layout.files}
        for name, entry in self.layout.entries.items():
            for piece in entry.pieces:
                self._held[piece.rank].append((name, tuple(end - begin for begin, end in piece.ranges)))
        self._check_files()

    def _check_files(self) -> None:
        wrong = []
        for rank in range(self.meta.ranks):
            path = rank_file(self.path, rank)
            expected = self.layout.files[rank].bytes
            if not path.is_file():
                wrong.append(f"{path.name} is missing")
            elif path.stat().st_size != expected:
                wrong.append(f"{path.name} has {path.stat().st_size} bytes in place of {expected}")
        if wrong:
            raise ConfigError(f"{self.path}: not whole: {some(wrong)}; copy it again or use another checkpoint")

    def names(self) -> Iterable[str]:
        return self.layout.entries.keys()

    def read(self, name: str) -> "SavedTensor":
        return SavedTensor(self, self.layout.entries[name], name)

    def part(self, rank: int) -> dict[str, StoredTensor]:
        """The tensors of a rank's file, and a check of its header."""
        if rank not in self._parts:
            path = rank_file(self.path, rank)
            with open(path, "rb") as stream:
                start = stream.read(8)
                header = start + stream.read(min(int.from_bytes(start, "little"), self.layout.files[rank].bytes))
            if xxhash.xxh3_64_hexdigest(header) != self.layout.files[rank].header:
                raise ConfigError(f"{path}: damaged (checksum of its header); use another checkpoint")
            self._parts[rank], metadata = read_header(path)
            self._check_part(rank)
            try:
                self._private[rank] = convert(json.loads(metadata["private"]), dict, path)
            except (KeyError, ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: damaged ({error}); use another checkpoint") from None
        return self._parts[rank]

    def _check_part(self, rank: int) -> None:
        for name, shape in self._held[rank]:
            stored, dtype = self._parts[rank].get(name), DTYPES[self.layout.entries[name].dtype]
            if stored is None or (stored.shape, stored.dtype) != (shape, np.dtype(dtype)):
                del self._parts[rank]
                raise ConfigError(
                    f"{rank_file(self.path, rank)}: does not hold '{name}' as layout.json says; use another checkpoint"
                )

    def private(self, rank: int) -> dict[str, Any]:
        """What rank `rank` kept for itself; of another rank when fewer ranks saved."""
        self.part(rank % self.meta.ranks)
        return self._private[rank % self.meta.ranks]

    def verify(self, slots: Mapping[str, Slot]) -> None:
        """Compare every block of bytes that loading `slots` will read with its checksum."""
        jobs = [
            (name, piece, common)
            for name, slot in slots.items()
            for piece in self.layout.entries[name].pieces
            if (common := intersect(piece.ranges, slot.ranges)) is not None
        ]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checked = pool.map(lambda job: self._damage(*job), jobs)
            wrong = [text for text in tqdm(checked, total=len(jobs), desc="checksums", unit="part", delay=2) if text]
        if wrong:
            raise ConfigError(f"{self.path}: damaged: {some(wrong)}; copy it again or use another checkpoint")

    def _damage(self, name: str, piece: StoredPiece, wanted: Ranges) -> str:
        stored = self.part(piece.rank)[name]
        begin, end = 0, stored.nbytes
        if wanted and stored.nbytes:
            row = stored.nbytes // stored.shape[0]
            begin, end = (row * (edge - piece.ranges[0][0]) for edge in wanted[0])
        with open(stored.file, "rb") as stream:
            for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
                stream.seek(stored.offset + block * BLOCK_BYTES)
                data = stream.read(min(BLOCK_BYTES, stored.nbytes - block * BLOCK_BYTES))
                if xxhash.xxh3_64_hexdigest(data) != piece.checksums[block]:
                    return f"'{name}' in {stored.file.name}"
        return ""


class Averaged(Checkpoint):
    """A saved step whose weights are their averages (training/recipe.py).

    Raises:
        ConfigError: it has none.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        if not any(name.startswith(AVERAGE) for name in self.names()):
            raise ConfigError(f"{folder}: holds no averages; they are kept with recipe.ema_decay")

    def stored_as(self, name: str) -> str:
        """The name of what stands for a parameter; itself for one that is not trained, as a router's bias."""
        return AVERAGE + name if AVERAGE + name in self.layout.entries else name

    def read(self, name: str) -> "SavedTensor":
        return super().read(self.stored_as(name))

    def verify(self, slots: Mapping[str, Slot]) -> None:
        super().verify({self.stored_as(name): slot for name, slot in slots.items()})


class SavedTensor:
    """One parameter of a checkpoint; indexing with slices puts the asked part together."""

    def __init__(self, checkpoint: Checkpoint, entry: Entry, name: str):
        self.checkpoint, self.entry, self.name = checkpoint, entry, name
        self.shape = entry.shape
        self.dtype = np.dtype(DTYPES[entry.dtype])

    def __getitem__(self, index: Any) -> np.ndarray:
        wanted, dropped = box(index, self.shape)
        result = np.empty([end - begin for begin, end in wanted], self.dtype)
        for piece in self.entry.pieces:
            common = intersect(piece.ranges, wanted)
            if common is not None:
                part = self.checkpoint.part(piece.rank)[self.name][within(common, piece.ranges)]
                result[within(common, wanted)] = part
        return result[dropped]

    def stored(self) -> Iterator[StoredTensor]:
        """The parts that the ranks saved."""
        for piece in self.entry.pieces:
            yield self.checkpoint.part(piece.rank)[self.name]


def box(index: Any, shape: tuple[int, ...]) -> tuple[Ranges, tuple]:
    """The ranges that an index of whole numbers, slices of step 1 and `...` asks for, and what drops its numbers."""
    items = index if isinstance(index, tuple) else (index,)
    if Ellipsis not in items:
        items = (*items, Ellipsis)
    middle = items.index(Ellipsis)
    items = items[:middle] + (slice(None),) * (len(shape) - len(items) + 1) + items[middle + 1 :]
    ranges = []
    for item, size in zip(items, shape, strict=True):
        begin, end, step = (
            item.indices(size) if isinstance(item, slice) else (range(size)[item], range(size)[item] + 1, 1)
        )
        if step != 1:
            raise IndexError(f"a stored parameter is cut in steps of 1, not {step}")
        ranges.append((begin, max(begin, end)))
    return tuple(ranges), tuple(slice(None) if isinstance(item, slice) else 0 for item in items)


def within(inner: Ranges, outer: Ranges) -> tuple[slice, ...]:
    """Slices that cut `inner` from an array that holds `outer`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True))


def some(items: list[str]) -> str:
    """The first few of a list, and how many there are."""
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def check_names(
    source: Source, slots: Mapping[str, Slot], whole_model: bool = True, may_leave: Callable[[str], bool] | None = None
) -> None:
    """Check that the source has every asked parameter, in its shape, and no weights that nobody asks for.

    Args:
        whole_model: False for a rank that holds a part of the parameters.
        may_leave: says of a weight of the source that it may stay unused.

    Raises:
        ConfigError: the names that do not fit.
    """
    names = set(source.names())
    lost = [name for name in slots if name not in names]
    if lost:
        raise ConfigError(
            f"{source.path}: lacks {len(lost)} parameters of this model: {some(lost)}; give a checkpoint of this model"
        )
    other = [
        f"'{name}' is {tuple(source.read(name).shape)} there and {slot.full_shape} here"
        for name, slot in slots.items()
        if tuple(source.read(name).shape) != slot.full_shape
    ]
    if other:
        raise ConfigError(f"{source.path}: {len(other)} parameters have another shape: {some(other)}")
    unused = [n for n in names - slots.keys() if is_weight(n, names) and not (may_leave and may_leave(n))]
    if whole_model and unused:
        raise ConfigError(
            f"{source.path}: holds {len(unused)} weights that this model lacks: {some(sorted(unused))}; give a "
            "checkpoint of this model"
        )


def load(source: Source, slots: Mapping[str, Slot]) -> Iterator[tuple[str, np.ndarray]]:
    """The parts that `slots` ask for, one parameter at a time.

    Raises:
        ConfigError: something is damaged; raised before the first part is returned.
    """
    if isinstance(source, Checkpoint):
        source.verify(slots)
    for name, slot in slots.items():
        yield name, source.read(name)[slot.slices]


def open_source(location: str | Path | None, step: str | None = None) -> Source:
    """The checkpoint at a folder of steps (the latest, or the one called `step`), a step, or safetensors files.

    Raises:
        ConfigError: nothing is there, or it is damaged.
    """
    path = Path(location or "")
    if not location or not path.exists():
        raise ConfigError(f"load_checkpoint is {location!r}, which does not exist; give the folder of a checkpoint")
    folder = find_step(path, step)
    if folder is not None:
        return Checkpoint(folder)
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        return PlainFiles(path)
    hint = f"; did you mean {str(path / 'checkpoint')!r}?" if (path / "checkpoint" / LATEST).exists() else ""
    raise ConfigError(
        f"load_checkpoint is {str(location)!r}, which holds no checkpoint: neither {LATEST} nor a folder step_N{hint}"
    )


def find_step(path: Path, step: str | None = None) -> Path | None:
    """The folder of a saved step at `path`; None when `path` is something else.

    Raises:
        ConfigError: there are steps, but not the asked one.
    """
    if (path / "meta.json").exists() or (path / "layout.json").exists():
        return path
    steps = [folder.name for folder in saved_steps(path)] if path.is_dir() else []
    if step is None and (path / LATEST).exists():
        step = read_latest(path)
    elif step is None and steps:
        step = steps[-1]
    if step is None:
        return None
    if step not in steps:
        raise ConfigError(f"{path}: has no checkpoint {step!r}, only {', '.join(steps) or 'none'}")
    return path / step


def read_latest(path: Path) -> str:
    """The name of the newest step in the folder of a run's checkpoints. Raises ConfigError when it cannot be read."""
    try:
        return (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path / LATEST}: cannot be read: {getattr(error, 'strerror', None) or error}; write the name of a step "
            "into it, or remove it"
        ) from None
