"""Write a file so that its name never stands for half of it: under a temporary name first, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give an OSError that does not say which file it is about (a write's does not) this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole_file(path: str | Path, durable: bool = False) -> Iterator[Path]:
    """Yield the temporary path to write to; it gets its final name when the block ends well, and is removed if not.

    The temporary name keeps the suffix, from which some libraries take the format. `durable` waits until the bytes
    and the name are on the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial_{path.name}")
    try:
        with naming(path):
            yield temporary
            if durable:
                flush(temporary)
            os.replace(temporary, path)
            if durable:
                flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str, durable: bool = False) -> None:
    """Write a whole text file, UTF-8."""
    with whole_file(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, durable: bool = False) -> None:
    """Write a whole JSON file, indented."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False), durable)
