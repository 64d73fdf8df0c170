"""A folder of built indices that many ranks share: whole entries or none, found by all that decides their content."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

FORMAT = 1  # Raise it when the meaning of a description or an array changes.


def fingerprint(array: np.ndarray) -> str:
    """Short checksum of an array's bytes and size."""
    return f"{len(array)}-{xxhash.xxh3_128_hexdigest(array)}"


def load_or_build(
    folder: Path, description: dict[str, object], build: Callable[[], dict[str, np.ndarray]]
) -> list[np.ndarray]:
    """The arrays of the entry that ``description`` names, built first if missing or damaged; memory-mapped.

    One process builds while the others wait. An entry is a folder that appears by one rename. Where nothing can be
    written the arrays stay in memory, with a warning.
    """
    text = json.dumps({"format": FORMAT, **description}, indent=1, sort_keys=True)
    entry = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError, ValueError):
        return _load(entry, text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")):
            with contextlib.suppress(OSError, ValueError):
                return _load(entry, text)
            arrays = build()
            _save(entry, text, arrays)
    except OSError as error:
        warnings.warn(f"cannot keep indices in {folder} ({error}); every start builds them again", stacklevel=2)
        return list(build().values())
    return _load(entry, text)


def _load(entry: Path, text: str) -> list[np.ndarray]:
    """Map an entry's arrays. OSError: it is not there. ValueError: it is damaged."""
    if (entry / "description.json").read_text() != text:
        raise ValueError(f"{entry} describes other data")
    names = json.loads((entry / "arrays.json").read_text())
    return [np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]


def _save(entry: Path, text: str, arrays: dict[str, np.ndarray]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        (temporary / "arrays.json").write_text(json.dumps(list(arrays)))
        (temporary / "description.json").write_text(text)
        os.chmod(temporary, 0o755)
        shutil.rmtree(entry, ignore_errors=True)  # A damaged entry, or nothing.
        os.rename(temporary, entry)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Without it (a filesystem that has no locks) ranks build twice, and the rename still is safe."""
    with open(path, "w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
