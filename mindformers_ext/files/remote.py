"""Files by path or by address (s3://, hdfs://, oss://, ...): the package fsspec opens those, with its own credentials.

A remote file appears whole when its upload ends, so a name never stands for half of one there either.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Sequence
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


def upload(files: Sequence[tuple[str, str]]) -> None:
    """Local files to addresses, one after another: what comes last says that the others are there."""
    for local, address in files:
        filesystem(address).put_file(local, address)
