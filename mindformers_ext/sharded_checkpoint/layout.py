"""Which rank holds which part of which parameter, and the two JSON files that say so for a saved step."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.atomic import write_json
from mindformers_ext.files.json_files import convert, read_object
from mindformers_ext.files.safetensors_format import DTYPES
from mindformers_ext.sharded_checkpoint.shards import GRADIENT_BUFFERS, Ranges, Slot, layout_for, slot_of

FORMAT = 1
BLOCK_BYTES = 4 * 2**20
# Sums over the micro-batches of one step: zero, or about to be, whenever a step has ended.
COUNTERS = ("expert_load", "dropped_choices", "loss_parts", "max_logits_val")
# Parameters that no checkpoint decides, but the YAML, training/bad_steps.py and training/recipe.py.
SETTINGS = ("learning_rate", "norm_limit", "mtp_loss_factor")
AVERAGE = "average."  # before the name of a weight: its average over the steps (training/recipe.py)


@dataclass(frozen=True)
class Piece:
    """A part of a parameter with its values."""

    array: np.ndarray
    slot: Slot


@dataclass(frozen=True)
class StoredPiece:
    """A part of a parameter in a rank's file; one checksum for every BLOCK_BYTES of it."""

    rank: int
    ranges: Ranges
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class StoredFile:
    """A rank's file: its size in bytes, and the checksum of what stands before the first tensor."""

    bytes: int
    header: str


@dataclass
class Entry:
    """One parameter of a checkpoint; `dtype` is safetensors' name."""

    shape: tuple[int, ...]
    dtype: str
    pieces: list[StoredPiece] = field(default_factory=list)


@dataclass
class Layout:
    """Every parameter by name and every rank's file by rank."""

    entries: dict[str, Entry] = field(default_factory=dict)
    files: dict[int, StoredFile] = field(default_factory=dict)

    def add(self, other: "Layout") -> None:
        """Take in what another rank wrote; a part that several pipeline stages wrote is kept once.

        Raises:
            ValueError: the ranks disagree about a parameter.
        """
        self.files |= other.files
        for name, entry in other.entries.items():
            own = self.entries.setdefault(name, Entry(entry.shape, entry.dtype))
            if (own.shape, own.dtype) != (entry.shape, entry.dtype):
                raise ValueError(f"'{name}' is {own.dtype} {own.shape} on one rank, {entry.dtype} {entry.shape} on one")
            for piece in entry.pieces:
                twins = [known for known in own.pieces if known.ranges == piece.ranges]
                if not twins:
                    own.pieces.append(piece)
                elif twins[0].checksums != piece.checksums:
                    raise ValueError(f"'{name}' {piece.ranges} differs between ranks {twins[0].rank} and {piece.rank}")

    def incomplete(self) -> list[str]:
        """Names of the parameters of which some elements lie in no file."""
        return [name for name, entry in self.entries.items() if not covers(entry.pieces, entry.shape)]

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dictionaries."""
        files = {str(rank): asdict(file) for rank, file in self.files.items()}
        return {"entries": {name: asdict(entry) for name, entry in self.entries.items()}, "files": files}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str | Path) -> "Layout":
        """What to_json returned. Raises ConfigError that begins with `where` when it is something else."""
        return convert(content, cls, where)

    def check(self, ranks: int) -> None:
        """Check that the layout can be of a checkpoint of this many ranks. Raises ValueError."""
        if len(self.files) != ranks or not all(0 <= rank < ranks for rank in self.files):
            raise ValueError(f"it has the files of ranks {sorted(self.files)[:8]}, not of {ranks} ranks")
        for name, entry in self.entries.items():
            if entry.dtype not in DTYPES:
                raise ValueError(f"'{name}' has the unknown type {entry.dtype}")
            size = np.dtype(DTYPES[entry.dtype]).itemsize
            for piece in entry.pieces:
                inside = len(piece.ranges) == len(entry.shape) and all(
                    0 <= begin <= end <= full for (begin, end), full in zip(piece.ranges, entry.shape, strict=True)
                )
                count = math.prod(end - begin for begin, end in piece.ranges) if inside else -1
                if piece.rank not in self.files or len(piece.checksums) != -(-count * size // BLOCK_BYTES):
                    raise ValueError(f"'{name}' {piece.ranges} of {entry.shape} on rank {piece.rank} cannot be")
        lost = self.incomplete()
        if lost:
            raise ValueError(f"no rank holds some elements of '{lost[0]}'")


@dataclass(frozen=True)
class Meta:
    """Where a training stood when it was saved."""

    step: int  # steps since the very first start
    ranks: int  # processes that saved
    epoch: int = 0  # whole passes over the data
    consumed_samples: int = 0  # of the current pass, all ranks together
    data_hash: str = ""  # of the data and its order; "" when it is not known
    prefix: str = ""  # the run's name
    model: dict[str, int] = field(default_factory=dict)  # sizes, see model_facts
    versions: dict[str, str] = field(default_factory=dict)
    health: dict[str, list[float]] = field(default_factory=dict)  # what was usual so far, see bad_steps.py and gate.py
    format: int = FORMAT

    def check(self) -> None:
        """Check that its numbers can be. Raises ValueError."""
        for name in ("step", "epoch", "consumed_samples"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of meta.json is {getattr(self, name)}, but must be at least 0")
        if self.ranks < 1:
            raise ValueError(f"ranks of meta.json is {self.ranks}, but must be at least 1")


def is_state(name: str) -> bool:
    """True for a parameter that a checkpoint must hold to go on exactly: not a counter, buffer or setting."""
    return not name.endswith(COUNTERS) and not name.startswith(GRADIENT_BUFFERS) and name not in SETTINGS


def is_weight(name: str, names: Iterable[str]) -> bool:
    """True for a weight of the model, False for what only training needs (`adam_m.<weight>`, `global_step`)."""
    return "." in name and name.partition(".")[2] not in names


def intersect(first: Ranges, second: Ranges) -> Ranges | None:
    """The common part, None when there is none."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(first, second, strict=True))
    return None if any(begin >= end for begin, end in common) else common


def covers(pieces: Iterable[StoredPiece], shape: tuple[int, ...]) -> bool:
    """True when the pieces together hold every element."""
    pieces = list(pieces)
    cuts = [sorted({0, size, *(edge for p in pieces for edge in p.ranges[d])}) for d, size in enumerate(shape)]
    filled = np.zeros([len(cut) - 1 for cut in cuts], bool)
    for piece in pieces:
        cells = (slice(cut.index(b), cut.index(e)) for cut, (b, e) in zip(cuts, piece.ranges, strict=True))
        filled[tuple(cells)] = True
    return bool(filled.all()) and (bool(pieces) or math.prod(shape) == 0)


def compiled_slots(compiled: Mapping[str, Any]) -> dict[str, Slot]:
    """What a rank holds, from its `compiled.json` (rank_compiler/compile_rank.py), counters left out."""
    layouts = compiled["layouts"]
    devices = max((math.prod(layout["device_matrix"]) for layout in layouts.values()), default=1)
    index = compiled["rank"] % devices
    slots = {}
    for name, stored in compiled["parameters"].items():
        if is_state(name):
            slots[name] = slot_of(name, stored["shape"], layout_for(name, layouts), index)
    return slots


def write_signed_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that tells when it was changed, and wait until it is on the disk."""
    write_json(path, {"checksum": digest(content), **content}, durable=True)


def read_signed_json(path: Path) -> dict[str, Any]:
    """Read what write_signed_json wrote.

    Raises:
        ConfigError: the file is missing or was changed.
    """
    if not path.exists():
        raise ConfigError(f"{path.parent}: {path.name} is missing; the checkpoint is not whole, use another")
    try:
        content = read_object(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; it is damaged, use another checkpoint") from None
    if content.pop("checksum", None) != digest(content):
        raise ConfigError(f"{path}: damaged (its checksum does not match its content); use another checkpoint")
    return content


def digest(content: Any) -> str:
    """Checksum of anything that JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
