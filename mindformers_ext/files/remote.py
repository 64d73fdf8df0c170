"""Files by path or by address (s3://, hdfs://, oss://, ...): the package fsspec opens those, with its own credentials.

A remote file appears whole when its upload ends, so a name never stands for half of one there either.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 8 << 20  # bytes asked of a server at once


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is an address."""
    return "://" in str(path)


def filesystem(address: str) -> AbstractFileSystem:
    """The file system of an address. Raises ValueError where a package is missing."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(address)[0]
    except ImportError as error:
        raise ValueError(f"{address} needs a package: {error}") from None


def open_binary(path: str) -> io.BufferedIOBase:
    """A file to read from any place in it."""
    return filesystem(path).open(path, "rb", block_size=BLOCK) if is_remote(path) else open(path, "rb")


def state(path: str) -> list[object]:
    """Size, and what changes when the file does: what two runs compare."""
    if not is_remote(path):
        found = os.stat(path)
        return [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    info = filesystem(path).info(path)
    return [path, info["size"], str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))]


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return filesystem(path).isfile(path) if is_remote(path) else os.path.isfile(path)


def size(path: str) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    return filesystem(path).size(path) if is_remote(path) else os.path.getsize(path)


def matches(pattern: str) -> list[str]:
    """Files of a name or glob pattern, sorted."""
    if not is_remote(pattern):
        return [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern)))
    files = filesystem(pattern)
    return [files.unstrip_protocol(name) for name in sorted(files.glob(pattern))]


def read_text(path: str) -> str:
    """A small file. Raises FileNotFoundError."""
    with open_binary(path) as file:
        return file.read().decode("utf-8")


@contextmanager
def sent_to(prefix: str, pairs: Sequence[str]) -> Iterator[str]:
    """A prefix of this machine to write under; at the end the .bin, .idx and .json of ``pairs`` go to their addresses.

    What an interrupted program wrote is there again for the next one of the same prefix. A local prefix is itself.
    """
    if not is_remote(prefix):
        yield prefix
        return
    name = hashlib.sha256(prefix.encode()).hexdigest()[:16]
    scratch = Path(tempfile.gettempdir()) / f"bin_dataset-{os.getuid()}-{name}"
    scratch.mkdir(exist_ok=True)
    yield str(scratch / os.path.basename(prefix))
    for suffix in ("bin", "idx", "json"):  # what comes last says that the others are there
        for pair in pairs:
            file = scratch / f"{os.path.basename(pair)}.{suffix}"
            if file.is_file():
                filesystem(pair).put_file(str(file), f"{pair}.{suffix}")
    shutil.rmtree(scratch)
