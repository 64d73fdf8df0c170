"""Read and write Megatron's ``P.bin`` / ``P.idx`` pair, byte for byte as megatron-core 0.16.1 writes it.

``P.bin`` holds the tokens of all sequences one after another. ``P.idx`` holds, little endian: the magic word, the
version (uint64), the dtype code (uint8), the number of sequences S and of document marks D (uint64 each), then the
sequence lengths (S int32), their byte offsets in ``P.bin`` (S int64), the document marks (D int64: the first sequence
of each document, and S at the end) and, in multimodal files only, a mode per sequence (S int8).
"""

import fcntl
import hashlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.bin_dataset.index_cache import let_go
from mindformers_ext.bin_dataset.remote_tokens import RemoteTokens, local_copy
from mindformers_ext.files import remote
from mindformers_ext.files.atomic import naming

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 24  # tokens that are looked at together
PIECE = 1 << 22  # bytes that are copied at once


class CorruptDatasetError(ValueError):
    """A .bin/.idx pair that is damaged or does not belong together; the message names file, field and value."""


def bin_path(prefix: str | Path) -> Path:
    """The token file of a prefix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a prefix."""
    return Path(f"{prefix}.idx")


def loss_mask_prefix(prefix: str | Path) -> str:
    """Where the loss mask of a dataset lies: a second pair, 1 on tokens to be learnt, same lengths as the tokens."""
    return f"{prefix}_loss_mask"


def manifest_of(prefix: str) -> dict[str, Any] | None:
    """What the tool that made a dataset wrote beside it; None where there is nothing."""
    path = f"{prefix}.json"
    return json.loads(remote.read_text(path)) if remote.exists(path) else None


def ids_of_tokenizer(manifest: dict[str, Any] | None) -> int:
    """Ids of the largest tokenizer that made a dataset, or one of its parts; 0 where that is not known."""
    if not manifest:
        return 0
    return max([manifest.get("vocab_size") or 0, *map(ids_of_tokenizer, manifest.get("parts", ()))])


def smallest_dtype(vocab_size: int | None) -> type[np.number]:
    """The dtype Megatron's preprocessing picks: uint16 below 65,500 ids, int32 otherwise or when unknown."""
    return np.uint16 if vocab_size is not None and vocab_size < 65500 else np.int32


class IndexedDataset:
    """Memory-mapped, read-only view of a .bin/.idx pair.

    Attributes: ``dtype``; ``sequence_lengths`` (S,) int32 in tokens; ``sequence_pointers`` (S,) int64 in bytes;
    ``document_indices`` (D,) int64; ``sequence_modes`` (S,) int8 or None; ``tokens`` (total,) of ``dtype``.

    Opening checks everything that is cheap (sizes of both files against the index, sums of the lengths);
    ``check`` verifies every entry. Raises FileNotFoundError for a missing half, CorruptDatasetError otherwise.

    Of a prefix at an address (s3://...) the index is copied to ``cache``, the temporary folder by default, and the
    tokens stay where they are.
    """

    def __init__(self, prefix: str | Path, cache: str | None = None) -> None:
        self.prefix = str(prefix)
        if remote.is_remote(self.prefix):
            folder = cache or str(Path(tempfile.gettempdir()) / f"bin_dataset-{os.getuid()}-index")
            self._map_index(local_copy(f"{self.prefix}.idx", folder))
            self.tokens = RemoteTokens(f"{self.prefix}.bin", self.dtype)
            self._check_size(f"{self.prefix}.bin", self.tokens.nbytes)
            let_go(self._buffer)
            return
        for path, other in ((idx_path(prefix), bin_path(prefix)), (bin_path(prefix), idx_path(prefix))):
            if not path.is_file():
                also = f" although {other} does" if other.is_file() else ""
                raise FileNotFoundError(f"{path} does not exist{also}; give the prefix of a .bin/.idx pair")
        self._map_index(idx_path(self.prefix))
        self._map_tokens()
        let_go(self._buffer)

    def _map_index(self, path: Path) -> None:
        size = path.stat().st_size
        if size < HEADER.size:
            raise CorruptDatasetError(f"{path} is truncated: {size} bytes, its header alone has {HEADER.size}")
        buffer = np.memmap(path, mode="r", dtype=np.uint8)
        magic, version, code, sequences, marks = HEADER.unpack(buffer[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise CorruptDatasetError(f"{path} is not a Megatron index: it starts with {magic!r}, not {MAGIC!r}")
        if version != VERSION:
            raise CorruptDatasetError(f"{path} has format version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            raise CorruptDatasetError(f"{path} has dtype code {code}; known codes are {sorted(DTYPES)}")
        needed = HEADER.size + 12 * sequences + 8 * marks
        if size not in (needed, needed + sequences):
            raise CorruptDatasetError(
                f"{path} is truncated or damaged: {sequences} sequences and {marks} document marks need {needed} "
                f"bytes, the file has {size}"
            )
        self.dtype = np.dtype(DTYPES[code])
        self._buffer = buffer
        self._offset = HEADER.size
        self.sequence_lengths = self._take(np.int32, sequences)
        self.sequence_pointers = self._take(np.int64, sequences)
        self.document_indices = self._take(np.int64, marks)
        self.sequence_modes = self._take(np.int8, sequences) if size > needed else None
        self._check_marks(path, sequences)

    def _take(self, dtype: type[np.number], count: int) -> np.ndarray:
        array = np.frombuffer(self._buffer, dtype=dtype, count=count, offset=self._offset)
        self._offset += array.nbytes
        return array

    def _check_marks(self, path: Path, sequences: int) -> None:
        marks = self.document_indices
        if len(marks) == 0 or marks[0] != 0 or marks[-1] != sequences:
            ends = (int(marks[0]), int(marks[-1])) if len(marks) else ()
            raise CorruptDatasetError(
                f"{path}: the document marks must run from 0 to the number of sequences {sequences}, got {ends}"
            )
        if sequences and self.sequence_lengths.min() < 0:
            where = int(self.sequence_lengths.argmin())
            raise CorruptDatasetError(f"{path}: sequence {where} has length {self.sequence_lengths[where]}")

    def _map_tokens(self) -> None:
        path = bin_path(self.prefix)
        size = path.stat().st_size
        self._check_size(path, size)
        # An empty file cannot be mapped; mmap of zero bytes is an error on Linux.
        self.tokens = np.memmap(path, mode="r", dtype=self.dtype) if size else np.empty(0, self.dtype)

    def _check_size(self, path: str | Path, size: int) -> None:
        expected = int(self.sequence_lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if size != expected:
            raise CorruptDatasetError(
                f"{path} has {size} bytes, but the lengths in {idx_path(self.prefix)} sum to {expected} bytes of "
                f"{self.dtype.name}: the file is truncated, has another dtype or belongs to another index"
            )

    def check(self, vocab_size: int | None = None) -> None:
        """Verify every entry: offsets equal the running sum, document marks never fall, 0 <= token < vocab_size."""
        path = idx_path(self.prefix)
        offsets = np.zeros(len(self), np.int64)
        np.cumsum(self.sequence_lengths[:-1], dtype=np.int64, out=offsets[1:])
        wrong = np.flatnonzero(offsets * self.dtype.itemsize != self.sequence_pointers)
        if len(wrong):
            raise CorruptDatasetError(
                f"{path}: sequence {wrong[0]} starts at byte {self.sequence_pointers[wrong[0]]}, but the lengths "
                f"before it end at byte {offsets[wrong[0]] * self.dtype.itemsize}"
            )
        falls = np.flatnonzero(np.diff(self.document_indices) < 0)
        if len(falls):
            raise CorruptDatasetError(f"{path}: document mark {falls[0] + 1} is smaller than the one before it")
        if vocab_size is not None:
            self._check_ids(vocab_size)

    def _check_ids(self, vocab_size: int) -> None:
        for start in range(0, len(self.tokens), CHUNK):
            part = self.tokens[start : start + CHUNK]
            bad = (part < 0) | (part >= vocab_size)
            if bad.any():
                token = part[bad][0]
                raise CorruptDatasetError(
                    f"{bin_path(self.prefix)}: {self.place_of(token)} is {token}, outside the vocabulary of "
                    f"{vocab_size} ids; the data was made with another tokenizer"
                )

    def place_of(self, token: int) -> str:
        """Where a token id occurs first, in words: token, sequence and document. Raises ValueError if it does not."""
        for start in range(0, len(self.tokens), CHUNK):
            found = np.flatnonzero(self.tokens[start : start + CHUNK] == token)
            if len(found):
                at = start + int(found[0])
                ends = np.cumsum(self.sequence_lengths, dtype=np.int64)
                sequence = int(np.searchsorted(ends, at, side="right"))
                document = int(np.searchsorted(self.document_indices, sequence, side="right")) - 1
                return f"token {at} (sequence {sequence}, document {document})"
        raise ValueError(f"{bin_path(self.prefix)} has no token {token}")

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    @property
    def num_documents(self) -> int:
        """How many documents the index marks, empty ones included."""
        return len(self.document_indices) - 1

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens ``offset`` to ``offset + length`` of one sequence, a view into the mapped file.

        Raises IndexError outside the dataset or the sequence.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {self.prefix}, which has {len(self)}")
        available = int(self.sequence_lengths[index])
        length = available - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > available:
            raise IndexError(f"tokens {offset} to {offset + length} of sequence {index}, which has {available}")
        start = self._start(index % len(self)) + offset
        return self.tokens[start : start + length]

    def _start(self, index: int) -> int:
        """First token of a sequence. Raises CorruptDatasetError unless the sequence ends where the next one starts."""
        start = int(self.sequence_pointers[index])
        end = start + int(self.sequence_lengths[index]) * self.dtype.itemsize
        ends_at = self.sequence_pointers[index + 1] if index + 1 < len(self) else self.tokens.nbytes
        if end != ends_at or start < 0 or start % self.dtype.itemsize:
            raise CorruptDatasetError(
                f"{idx_path(self.prefix)}: sequence {index} takes the bytes {start} to {end}, but the next one starts "
                f"at {ends_at}"
            )
        return start // self.dtype.itemsize


class IndexedDatasetWriter:
    """Write a .bin/.idx pair under temporary names and give both their final name in ``close``.

    As a context manager it closes on success and removes the temporary file on an exception. Two writers on the same
    prefix are refused. Token ids that do not fit ``dtype`` raise ValueError.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.number] = np.int32) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"dtype {self.dtype} is not in the format; choose one of {sorted(map(str, CODES))}")
        self._lengths: list[np.ndarray] = []  # of each batch: int32
        self._marks: list[tuple[int, np.ndarray]] = [(0, np.zeros(1, np.int64))]  # and what is to be added to each
        self._sequences = 0
        self.pieces: list[tuple[int, str]] = []  # bytes and sha256 of the tokens, part after part
        self._digest: hashlib._Hash | None = None
        self._partial = Path(f"{prefix}.bin.partial")
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        # Not for appending: Linux then ignores the place that a copy is to be written to.
        self._file = open(os.open(self._partial, os.O_WRONLY | os.O_CREAT, 0o666), "wb")  # noqa: SIM115
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RuntimeError(
                f"another process is writing {self._partial}; wait for it or choose another prefix"
            ) from None
        # Opening and locking are two steps: a writer that ended in between has given this very file its final name.
        if not self._is_partial():
            self._file.close()
            raise RuntimeError(f"another process has just finished {prefix}; start again to write it anew")
        self._file.truncate(0)

    def _is_partial(self) -> bool:
        """True while the temporary name stands for the file that this writer has open."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._partial))
        except FileNotFoundError:
            return False

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self.abort()

    def add_document(self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | None = None) -> None:
        """Append one document of one or (``lengths``) several sequences; ``lengths=[]`` marks an empty document."""
        lengths = [len(tokens)] if lengths is None else lengths
        self.add_batch(np.asarray(tokens), np.asarray(lengths, np.int32), np.array([len(lengths)], np.int64))

    def add_indices(self, prefixes: Sequence[str | Path], threads: int = 8) -> list[str]:
        """Append all documents of other datasets of the same dtype; returns the sha256 of each one's tokens.

        The tokens are read once, copied by several threads, each to its place.
        """
        self._file.flush()
        self._end_piece()
        at = self._file.tell()
        copies = []
        for prefix in prefixes:
            other = IndexedDataset(prefix)
            if other.dtype != self.dtype:
                raise ValueError(f"{prefix} holds {other.dtype}, {self.prefix} is being written as {self.dtype}")
            self._lengths.append(other.sequence_lengths)
            self._marks.append((self._sequences, other.document_indices[1:]))
            self._sequences += len(other)
            copies.append((f"{prefix}.bin", at, other.tokens.nbytes))
            at += other.tokens.nbytes
        with naming(self._partial), ThreadPoolExecutor(threads) as pool:
            checksums = list(pool.map(self._copy, copies))
            self._file.seek(at)
        self.pieces += [(size, checksum) for (_, _, size), checksum in zip(copies, checksums, strict=True)]
        return checksums

    def _copy(self, copy: tuple[str, int, int]) -> str:
        path, at, size = copy
        digest, piece = hashlib.sha256(), memoryview(bytearray(min(PIECE, size)))
        with remote.open_binary(path) as source:
            while count := size and source.readinto(piece):
                digest.update(piece[:count])
                at += write_all(self._file.fileno(), piece[:count], at)
        return digest.hexdigest()

    def add_batch(self, tokens: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray) -> None:
        """Append many documents: flat tokens, the length of each sequence, how many sequences each document has."""
        lengths = np.asarray(lengths, np.int32)
        if int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise ValueError(f"lengths sum to {lengths.sum(dtype=np.int64)} but there are {len(tokens)} tokens")
        with naming(self._partial):
            data = _cast(tokens, self.dtype).data
            self._file.write(data)
        self._hash(data)
        self._lengths.append(lengths)
        self._marks.append((self._sequences, np.cumsum(sequences_per_document, dtype=np.int32)))
        self._sequences += len(lengths)

    def _hash(self, data: memoryview) -> None:
        """Tokens that are written here, not copied, are one piece until others come between."""
        if self._digest is None:
            self._digest, self._hashed = hashlib.sha256(), 0
        self._digest.update(data)
        self._hashed += data.nbytes

    def _end_piece(self) -> None:
        if self._digest is not None:
            self.pieces.append((self._hashed, self._digest.hexdigest()))
            self._digest = None

    @property
    def files(self) -> dict[str, object]:
        """What a manifest says of the pair after ``close``: the tokens are pieces, each with bytes and checksum."""
        pieces = [{"bytes": size, "sha256": checksum} for size, checksum in self.pieces]
        return {"bin": pieces, "idx": [{"bytes": self._index_bytes, "sha256": self._index_sha256}]}

    def close(self) -> None:
        """Write the index and rename both files; the .idx comes last, so a present .idx means a whole pair."""
        with naming(self._partial):
            self._file.flush()
            self._close()

    def _close(self) -> None:
        index = Path(f"{self.prefix}.idx.partial")
        documents = sum(len(marks) for _, marks in self._marks)
        self._end_piece()
        with open(index, "wb") as raw:
            file = _Hashing(raw)
            file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self._sequences, documents))
            for lengths in self._lengths:
                file.write(lengths.data)
            offset = 0
            for lengths in self._lengths:
                sizes = np.multiply(lengths, self.dtype.itemsize, dtype=np.int64)
                file.write((offset + np.cumsum(sizes) - sizes).data)
                offset += int(sizes.sum())
            for before, marks in self._marks:
                file.write(np.add(marks, before, dtype=np.int64).data)
        self._index_bytes, self._index_sha256 = file.bytes, file.digest.hexdigest()
        # The old index goes first: a kill between the renames must not leave it beside the new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._partial, bin_path(self.prefix))
        os.replace(index, idx_path(self.prefix))
        self._file.close()

    def abort(self) -> None:
        """Drop what was written."""
        self._partial.unlink(missing_ok=True)
        Path(f"{self.prefix}.idx.partial").unlink(missing_ok=True)
        self._file.close()


class _Hashing:
    """A file that is written, and its checksum."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.bytes += len(data) if isinstance(data, bytes) else data.nbytes


def write_all(descriptor: int, data: memoryview, at: int) -> int:
    """Write all of some bytes at a place in a file; returns how many."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)
    return done


def _cast(tokens: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if tokens.dtype == dtype:
        return np.ascontiguousarray(tokens)
    if dtype.kind in "iu" and len(tokens):
        limits = np.iinfo(dtype)
        low, high = tokens.min(), tokens.max()
        if low < limits.min or high > limits.max:
            raise ValueError(f"token ids {low} to {high} do not fit dtype {dtype.name} ({limits.min} to {limits.max})")
    return tokens.astype(dtype)
