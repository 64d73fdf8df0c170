"""A folder of built arrays that many ranks share: whole entries or none, found by all that decides their content.

An entry is a folder: ``description.json``, an ``.npy`` file for each array, and ``arrays.json`` with the checksum of
each. Nothing of it is believed before its checksum is compared: an entry that was changed, or that a loss of power left
half on the disk, is one that is not there. So nothing waits for the disk, which takes longer than to build again.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
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


def let_go(array: np.ndarray) -> None:
    """Give back the memory of what was read of a mapped file; what is read again comes from the file again.

    Of an array that is not mapped nothing happens.
    """
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    if array is not None:
        array.madvise(mmap.MADV_DONTNEED)


def default_folder(prefix: str) -> str:
    """Where the arrays of a dataset are kept unless ``path_to_cache`` says otherwise."""
    return f"{prefix}.index_cache"


def load_or_build(
    folder: Path, description: dict[str, object], build: Callable[[], dict[str, np.ndarray]]
) -> list[np.ndarray]:
    """The arrays of the entry that ``description`` names, built first if missing or damaged; memory-mapped.

    One process builds while the others wait. An entry is a folder that appears by one rename. Where nothing can be
    written the arrays stay in memory, with a warning.

    Raises:
        ValueError: this machine has not the memory for so many samples.
    """
    text = json.dumps({"format": FORMAT, **description}, indent=1, sort_keys=True)
    entry = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    stored = _load(entry, text)
    if stored is not None:
        return stored
    arrays = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")) as alone:
            stored = _load(entry, text)  # Another rank may have built it meanwhile.
            if stored is not None:
                return stored
            arrays = _build(build, folder)
            if alone:
                _remove_leftovers(entry)
            _save(entry, text, arrays)
            return [_map(entry, name) for name in arrays]
    except OSError as error:
        warnings.warn(f"cannot keep indices in {folder} ({error}); every start builds them again", stacklevel=2)
        return list((arrays or _build(build, folder)).values())


def _build(build: Callable[[], dict[str, np.ndarray]], folder: Path) -> dict[str, np.ndarray]:
    try:
        return build()
    except MemoryError as error:
        raise ValueError(
            f"the indices of so many samples do not fit into memory ({error}); ask for fewer samples, or build them "
            f"on a larger machine and copy {folder}"
        ) from None


def _load(entry: Path, text: str) -> list[np.ndarray] | None:
    """Map an entry's arrays; None if the entry is not there or damaged."""
    try:
        if (entry / "description.json").read_text() != text:
            return None
        checksums = json.loads((entry / "arrays.json").read_text())
        if any(_checksum(entry, name) != checksum for name, checksum in checksums.items()):
            return None
        return [_map(entry, name) for name in checksums]
    except (OSError, ValueError, AttributeError, RecursionError):  # JSON of any other kind
        return None


def _file(entry: Path, name: str) -> Path:
    return entry / f"{name}.npy"


def _map(entry: Path, name: str) -> np.ndarray:
    return np.load(_file(entry, name), mmap_mode="r", allow_pickle=False)


def _checksum(entry: Path, name: str) -> str:
    """Of a whole .npy file, its header too; read in pieces, which takes no memory of the process."""
    digest, piece = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    with open(_file(entry, name), "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def _write(path: Path, array: np.ndarray) -> str:
    """Write an .npy file and return its checksum, without reading the values back."""
    array = np.ascontiguousarray(array)
    with open(path, "wb+") as file:
        np.lib.format.write_array_header_2_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.seek(0)
        digest = xxhash.xxh3_128(file.read())
        digest.update(array)
        file.write(array.data)
    return digest.hexdigest()


def _save(entry: Path, text: str, arrays: dict[str, np.ndarray]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        checksums = {name: _write(_file(temporary, name), array) for name, array in arrays.items()}
        (temporary / "arrays.json").write_text(json.dumps(checksums))
        (temporary / "description.json").write_text(text)
        os.chmod(temporary, 0o755)
        shutil.rmtree(entry, ignore_errors=True)  # A damaged entry, or nothing.
        os.rename(temporary, entry)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_leftovers(entry: Path) -> None:
    """Remove what processes left that were killed while they built this entry; the caller holds its lock."""
    for path in entry.parent.glob(f".{entry.name}-*"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock file, and say whether it is held: a filesystem may have no locks.

    Ranks build twice then, and the rename still is safe.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
