"""Tokens that stay on an object store: samples are read from blocks, of which a bounded number is kept in memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np

from mindformers_ext.files import remote
from mindformers_ext.files.atomic import whole_file

BLOCK = 1 << 20  # bytes that are asked for together
KEPT_BLOCKS = 256  # of a process, whatever the number of its files
REQUESTS = 32  # under way at once


class BlockCache:
    """The blocks of all files that were used last."""

    def __init__(self, kept: int = KEPT_BLOCKS) -> None:
        self.kept = kept
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(REQUESTS)

    def read(self, address: str, size: int, ranges: list[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, stop) of a file of this size, many at once."""
        spans = [range(start // BLOCK, -(-stop // BLOCK)) for start, stop in ranges if stop > start]
        wanted = {number for span in spans for number in span}
        with self._lock:
            found = {number: block for number in wanted if (block := self._blocks.get((address, number))) is not None}
        missing = sorted(wanted - found.keys())
        for number, block in zip(missing, self._pool.map(lambda n: _fetch(address, size, n), missing), strict=True):
            found[number] = block
        with self._lock:
            for number, block in found.items():
                self._blocks[address, number] = block
                self._blocks.move_to_end((address, number))
            while len(self._blocks) > self.kept:
                self._blocks.popitem(last=False)
        return [_joined(found, start, stop) for start, stop in ranges]


def _fetch(address: str, size: int, number: int) -> bytes:
    end = min(size, (number + 1) * BLOCK)
    return remote.filesystem(address).cat_file(address, start=number * BLOCK, end=end)


def _joined(blocks: dict[int, bytes], start: int, stop: int) -> bytes:
    parts = []
    while start < stop:
        number, at = divmod(start, BLOCK)
        parts.append(blocks[number][at : at + stop - start])
        start += len(parts[-1])
    return b"".join(parts)


@cache
def block_cache() -> BlockCache:
    """The one of this process: made when it is first used, so a forked worker has its own threads."""
    return BlockCache()


class RemoteTokens:
    """The tokens of a .bin file at an address, read like an array of one dimension."""

    def __init__(self, address: str, dtype: np.dtype) -> None:
        self.address, self.dtype = address, dtype
        self.nbytes = remote.size(address)

    def __len__(self) -> int:
        return self.nbytes // self.dtype.itemsize

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return self.read([(start, stop)])[0]

    def read(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        """Tokens [start, stop), many at once."""
        width = self.dtype.itemsize
        found = block_cache().read(self.address, self.nbytes, [(start * width, stop * width) for start, stop in ranges])
        return [np.frombuffer(part, self.dtype) for part in found]


def local_copy(address: str, folder: str) -> Path:
    """A remote file on this machine, fetched once as long as it does not change."""
    name = hashlib.sha256(repr(remote.state(address)).encode()).hexdigest()[:32]
    path = Path(folder) / f"{name}{Path(address).suffix}"
    if not path.is_file():
        with whole_file(path) as temporary:
            remote.filesystem(address).get_file(address, str(temporary))
    return path
