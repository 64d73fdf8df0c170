"""Write a large file past the page cache.

Gigabytes that nobody reads soon would push other files out of memory, and getting pages for them can cost more than the
disk does (on a virtual machine several times more). Python has no such file object: direct writing wants aligned memory
and whole blocks.
"""

import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

BLOCK = 4096  # bytes; what direct writing aligns to on every disk of today
BUFFER_BYTES = 16 * 2**20
BUFFERS = 4  # so that the disk has work also while the caller waits for a core


class DirectFile:
    """A new file that arrays are appended to, in a `with` block; threads write full buffers while another fills.

    Where the file system has no direct writing (tmpfs) it is written as any file. The caller flushes it to the disk
    (files/atomic.py flush).
    """

    def __init__(self, path: str | Path):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        with suppress(OSError):
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, os.O_DIRECT)
        self.buffers = deque(np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), np.uint8) for _ in range(BUFFERS))  # aligned
        self.filled, self.size = 0, 0  # bytes in the first buffer, and in the file with it
        self.threads = ThreadPoolExecutor(2)
        self.writing: deque[Future] = deque()

    def append(self, array: np.ndarray) -> None:
        """Add the values in C order. Raises OSError when an earlier part could not be written."""
        rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        while rest.size:
            part = rest[: BUFFER_BYTES - self.filled]
            self.buffers[0][self.filled : self.filled + part.size] = part
            self.filled, self.size, rest = self.filled + part.size, self.size + part.size, rest[part.size :]
            if self.filled == BUFFER_BYTES:
                self._start_writing()

    def _start_writing(self) -> None:
        """Give the first buffer to a thread, in whole blocks; wait until the next one is free."""
        blocks = -(-self.filled // BLOCK) * BLOCK
        self.writing.append(self.threads.submit(self._write, self.buffers[0][:blocks].data, self.size - self.filled))
        self.buffers.rotate(-1)
        self.filled = 0
        if len(self.writing) == len(self.buffers):
            self.writing.popleft().result()

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self.descriptor, data, offset)
            data, offset = data[written:], offset + written

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        try:
            if error is None:
                self._start_writing()
                for writing in self.writing:
                    writing.result()
                os.ftruncate(self.descriptor, self.size)  # without the rest of the last block
        finally:
            self.threads.shutdown()
            os.close(self.descriptor)
