"""Write a checkpoint: every rank its own file, the first one the rest.

No rank talks to another. All write into one temporary folder, which must lie on a file system that all see; the first
rank waits for the files of the others, checks that together they hold every parameter, and renames the folder. A
checkpoint is thus whole or not there, whenever the run is killed; `latest` is renamed into place after it.
"""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mindformers_ext.errors import TrainingStopped, free_space
from mindformers_ext.files.atomic import flush, write_json, write_text
from mindformers_ext.files.json_files import read_object
from mindformers_ext.files.safetensors_format import header_of, layout_of
from mindformers_ext.sharded_checkpoint.copies import Copies
from mindformers_ext.sharded_checkpoint.gate import Gate, facts
from mindformers_ext.sharded_checkpoint.layout import (
    BLOCK_BYTES,
    Entry,
    Layout,
    Meta,
    Piece,
    StoredFile,
    StoredPiece,
    write_signed_json,
)

LATEST = "latest"
BEST = "best"  # names the step with the lowest evaluation loss (training/evaluation.py)
UNHEALTHY = "unhealthy_"  # before the name of one that the gate did not let through
PARTIAL = ".partial_"  # before the name of a step that is being written
REMOVED = ".removed_"  # before the name of one that is being deleted
POLL_SECONDS = 0.05
TIMEOUT_SECONDS = 1800.0

logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Name of a step's folder."""
    return f"step_{step:06d}"


def rank_file(folder: Path, rank: int) -> Path:
    """A rank's part of a checkpoint."""
    return folder / f"rank_{rank:04d}.safetensors"


def saved_steps(root: Path, prefix: str = "") -> list[Path]:
    """Folders of the whole checkpoints in `root`, oldest step first; of the others with the prefix UNHEALTHY."""
    found = [path for path in root.glob(f"{prefix}step_*") if re.fullmatch(r".*step_[0-9]+", path.name)]
    return sorted(filter(Path.is_dir, found), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.rpartition("_")[2])


class Saver:
    """Saves the steps of one run from one rank.

    Args:
        root: folder of the checkpoints, the same for all ranks.
        rank, ranks: this process and the number of processes.
        keep: newest steps to keep.
        in_background: copy the arrays and write them in a thread, on what the cores have left; the next save waits
            for it.
        timeout: seconds that the first rank waits for the others.
        keep_every: multiples of this step stay besides the newest.
        gate: what a healthy state is; None: every state is. `health` is what was usual so far.
    """

    def __init__(
        self,
        root: str | Path,
        rank: int = 0,
        ranks: int = 1,
        keep: int = 5,
        in_background: bool = False,
        timeout: float = TIMEOUT_SECONDS,
        keep_every: int | None = None,
        gate: Gate | None = None,
    ):
        self.keep_every, self.gate = keep_every, gate
        self.health: dict[str, list[float]] = {}
        self.root, self.rank, self.ranks, self.keep, self.timeout = Path(root), rank, ranks, keep, timeout
        self.pool = ThreadPoolExecutor(1, initializer=give_way) if in_background else None
        self.copies = Copies()
        self.running: Future | None = None

    def clear(self) -> None:
        """Remove what a run that was killed left half written; every rank calls it before the first step.

        The first rank does it, and no other can be saving yet, since a step needs all ranks.
        """
        if self.rank == 0:
            for leftover in [*self.root.glob(f"{PARTIAL}step_*"), *self.root.glob(f"{REMOVED}*step_*")]:
                shutil.rmtree(leftover)

    def save(
        self,
        meta: Meta,
        pieces: Mapping[str, Piece],
        private: Mapping[str, Any] | None = None,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        """Save this rank's part of a step. `private` is what this rank alone needs, anything that JSON can hold.

        `saved()` is called when it is on the disk, for the first rank when the whole step is.

        Raises:
            TrainingStopped: this save, or the one before in the background, failed.
        """
        self.wait()
        private = dict(private or {})
        if self.pool is None:
            self._save(meta, pieces, private, saved)
        else:
            own = {name: piece for name, piece in pieces.items() if piece.slot.copy == 0}
            copies = self.copies.take({name: piece.array for name, piece in own.items()})
            kept = {name: Piece(copies[name], piece.slot) for name, piece in own.items()}
            self.running = self.pool.submit(self._save, meta, kept, private, saved)

    def wait(self) -> None:
        """Wait until the last save is whole; raises what it raised."""
        if self.running is not None:
            running, self.running = self.running, None
            running.result()

    def _save(
        self, meta: Meta, pieces: Mapping[str, Piece], private: dict[str, Any], saved: Callable[[], None]
    ) -> None:
        partial = self.root / f"{PARTIAL}{step_name(meta.step)}"
        try:
            write_part(partial, self.rank, pieces, private, facts(pieces) if self.gate else {})
            if self.rank == 0:
                publish(partial, meta, self.timeout, self.gate, self.health)
                remove_old(self.root, self.keep, self.keep_every)
        except OSError as error:
            raise TrainingStopped(
                f"{partial}: cannot save step {meta.step}: {error.strerror or error}; make room"
                f"{free_space(partial)} or give another output_dir, and resume from the last checkpoint"
            ) from error
        saved()


def give_way() -> None:
    """Let the step's threads go before this one (Linux has a niceness for each thread)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def write_part(
    partial: Path,
    rank: int,
    pieces: Mapping[str, Piece],
    private: Mapping[str, Any],
    told: Mapping[str, Any] | None = None,
) -> None:
    """Write one rank's file, and when it is on the disk its part of the layout with what it has to tell the gate."""
    partial.mkdir(parents=True, exist_ok=True)
    own = {name: piece for name, piece in pieces.items() if piece.slot.copy == 0}
    layout = Layout()
    tensors = layout_of({name: piece.array for name, piece in own.items()})
    header = header_of(tensors, {"private": json.dumps(private)})
    with open(rank_file(partial, rank), "wb") as stream:
        stream.write(header)
        for name, piece in own.items():
            checksums = []
            for block in blocks(piece.array):
                stream.write(block)
                checksums.append(xxhash.xxh3_64_hexdigest(block))
            stored = StoredPiece(rank, piece.slot.ranges, tuple(checksums))
            layout.entries[name] = Entry(piece.slot.full_shape, tensors[name]["dtype"], [stored])
        stream.flush()
        os.fsync(stream.fileno())
    size = len(header) + sum(piece.array.nbytes for piece in own.values())
    layout.files[rank] = StoredFile(size, xxhash.xxh3_64_hexdigest(header))
    write_json(part_file(partial, rank), {"layout": layout.to_json(), "told": told or {}})


def part_file(partial: Path, rank: int) -> Path:
    """A rank's part of the layout, until the first rank has put them together."""
    return partial / f"rank_{rank:04d}.json"


def blocks(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array, BLOCK_BYTES at a time."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    for begin in range(0, len(raw), BLOCK_BYTES):
        yield raw[begin : begin + BLOCK_BYTES]


def publish(
    partial: Path, meta: Meta, timeout: float, gate: Gate | None = None, health: dict[str, list[float]] | None = None
) -> Path:
    """Wait for all ranks' parts, check them, and give the folder its name; returns it.

    A state that `gate` refuses gets another name, and a healthy one adds to `health`, which is saved with it.

    Raises:
        TrainingStopped: a rank did not write in time, or the parts do not make up every parameter.
    """
    layout, told = Layout(), []
    for rank in range(meta.ranks):
        wait_for(part_file(partial, rank), rank, meta, timeout)
        try:
            part = read_object(part_file(partial, rank))
            layout.add(Layout.from_json(part["layout"], part_file(partial, rank)))
            told.append(part["told"])
        except ValueError as error:
            raise TrainingStopped(f"{partial}: step {meta.step} cannot be saved: {error}; the ranks diverged") from None
        part_file(partial, rank).unlink()
    lost = layout.incomplete()
    if lost:
        raise TrainingStopped(
            f"{partial}: step {meta.step} cannot be saved: no rank holds some elements of {len(lost)} parameters, the "
            f"first is {lost[0]!r}"
        )
    health = {} if health is None else health
    reasons = gate.reasons(told, health) if gate else []
    write_signed_json(partial / "layout.json", layout.to_json())
    write_signed_json(partial / "meta.json", asdict(replace(meta, health=meta.health | health)))
    flush(partial)
    return set_aside(partial, reasons) if reasons else rename(partial)


def wait_for(path: Path, rank: int, meta: Meta, timeout: float) -> None:
    """Wait until a rank's part of the layout is there."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise TrainingStopped(
                f"{path.parent}: rank {rank} of {meta.ranks} has not written its part of step {meta.step} after "
                f"{timeout:.0f} s; see that rank's log, and that all ranks see this folder"
            )
        time.sleep(POLL_SECONDS)


def rename(partial: Path) -> Path:
    """Give a whole checkpoint its name and make it the latest; one of the same name gives way."""
    root, final = partial.parent, partial.with_name(partial.name.removeprefix(PARTIAL))
    if final.exists():  # a run that went back to an earlier step writes this one again
        others = [path for path in saved_steps(root) if path != final]
        if others:
            write_text(root / LATEST, others[-1].name, durable=True)
        else:
            (root / LATEST).unlink(missing_ok=True)
        remove(final)
    os.rename(partial, final)
    flush(root)
    write_text(root / LATEST, final.name, durable=True)
    return final


def set_aside(partial: Path, reasons: list[str]) -> Path:
    """Give a checkpoint that is not healthy a name of its own; the latest stays."""
    final = partial.with_name(UNHEALTHY + partial.name.removeprefix(PARTIAL))
    logger.warning("%s is not healthy: %s; %s goes on naming the step before", final, "; ".join(reasons), LATEST)
    if final.exists():
        remove(final)
    os.rename(partial, final)
    flush(final.parent)
    return final


def remove_old(root: Path, keep: int, keep_every: int | None = None) -> None:
    """Delete the lowest steps until `keep` are left; the latest, the best and multiples of `keep_every` always stay."""
    named = {path.read_text(encoding="utf-8") for path in (root / LATEST, root / BEST) if path.exists()}
    for prefix in ("", UNHEALTHY):
        old = [path for path in saved_steps(root, prefix) if path.name not in named]
        if keep_every and not prefix:
            old = [path for path in old if step_of(path) % keep_every]
        for path in old[: max(len(old) + (not prefix) - keep, 0)]:
            remove(path)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no half of it ever bears its name."""
    doomed = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
