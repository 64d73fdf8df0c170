"""Read parts of safetensors files and write folders of them without holding more than one piece in memory.

The safetensors package knows no numpy bfloat16 and writes a file only from tensors that are all in memory, so it reads
the headers only. The format is an 8-byte length, a JSON header and the bytes of the tensors. Types are those of
ml_dtypes.
"""

import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.atomic import whole_file, write_json
from mindformers_ext.files.direct import DirectFile
from mindformers_ext.files.json_files import read_object

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors package
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")  # how HuggingFace and we name one of several files
MAX_VALUES = 2**60  # numpy's limit in bytes is 2**63, counted without the dimensions that are 0
Piece = Callable[[], np.ndarray]  # makes a part of a tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; indexing reads (maps) the asked part only."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, slices) -> np.ndarray:
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)[slices]
        raw = np.memmap(self.file, np.uint8, "r", self.offset, (self.nbytes,))
        return np.asarray(raw).view(self.dtype).reshape(self.shape)[slices]

    def stored(self) -> Iterator["StoredTensor"]:
        """The tensors in files that this one is made of: itself."""
        yield self


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of one file, read by the safetensors package, which checks that the tensors fill the file.

    Raises:
        ConfigError: the file is cut short, is no safetensors file or holds a type that is unknown here.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, MAX_HEADER):
            raise ConfigError(f"{file}: not a whole safetensors file ({size} bytes): copy it again")
        tensors, offset = {}, 8 + length
        with safe_open(file, "numpy") as header:
            for name in header.offset_keys():  # without gaps, or the package would have refused the file
                part = header.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ConfigError(f"{file}: tensor {name!r} has type {part.get_dtype()}, which is unknown here")
                dtype, shape = np.dtype(DTYPES[part.get_dtype()]), tuple(part.get_shape())
                if math.prod(size or 1 for size in shape) > MAX_VALUES:
                    raise ConfigError(f"{file}: tensor {name!r} has shape {shape}, which no array can have")
                tensors[name] = StoredTensor(name, file, dtype, shape, offset)
                offset += tensors[name].nbytes
            return tensors, header.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"{file}: not a safetensors file: {error}; copy it again") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None


def read_folder(folder: Path, index: str) -> dict[str, StoredTensor]:
    """Every tensor of the files that the index `index` names; of all *.safetensors files where there is no index.

    Raises:
        ConfigError: a file is missing or damaged, the index and the files disagree, or two files hold one tensor, so
            that one of them is of another time than the rest.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not (folder / index).exists():
        if not files:
            raise ConfigError(f"{folder}: holds no .safetensors file")
        part = next((file.name for file in files if SHARD.search(file.name)), None)
        if part:
            raise ConfigError(
                f"{folder}: holds {part}, a part of several, but not {index}; the download or conversion was not "
                "finished: do it again"
            )
        return joined(files)
    weight_map = read_index(folder / index)
    named = set(weight_map.values())
    for name in sorted(named):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / index}: names the file {name!r}, which is not in the folder; copy it there")
    tensors = joined([folder / name for name in sorted(named)])
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ConfigError(f"{folder / index}: tensor {name!r} is not in its file {file!r}; copy the folder again")
    for file in files:
        twins = [] if file.name in named else sorted(tensors.keys() & read_header(file)[0].keys())
        if twins:
            raise ConfigError(
                f"{folder}: {twins[0]!r} is in {file.name} and in {weight_map[twins[0]]}, which {index} names; one of "
                "them is of another time: remove it"
            )
    return tensors


def joined(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of several files. Raises ConfigError when two hold the same one."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file)[0].items():
            if name in tensors:
                raise ConfigError(
                    f"{file.parent}: {name!r} is in {tensors[name].file.name} and in {file.name}; remove the file that "
                    "is not of this model"
                )
            tensors[name] = tensor
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor to file."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(
            f"{path}: not a safetensors index: weight_map is {weight_map!r}, but must name tensors' files"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ConfigError(f"{path}: not a safetensors index: {name!r} is in {file!r}, which is no file's name")
    return weight_map


@dataclass(frozen=True)
class Output:
    """A tensor to write; the arrays that `pieces` return, one after the other, are its values in C order."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Sequence[Piece]

    @property
    def nbytes(self) -> int:
        """Bytes it takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What `write_folder` did."""

    tensors: int
    bytes: int
    files: int
    files_kept: int  # were there already, with the same fingerprint


def write_folder(
    folder: Path,
    outputs: Iterable[Output],
    prefix: str,
    source: str,
    metadata: dict[str, str],
    workers: int,
    shard_bytes: int = 5 * 10**9,
) -> Written:
    """Write tensors to `{prefix}-00001-of-000NN.safetensors` and an index; `workers` threads make the pieces.

    A file gets its name when it is whole and on the disk, the index comes last. A file that is there already with the
    same fingerprint (its tensors, types and `source`, a text that changes with the source) is not written again.
    What an earlier call wrote and this one does not is removed, so that nobody reads old tensors: its index before the
    first new file, its files before the new index. Memory: two pieces for each worker.

    Raises:
        ConfigError: the folder holds weights `{prefix}*.safetensors` that this function did not write.
    """
    old = written_before(folder, prefix)
    shards = split(outputs, shard_bytes)
    names = [f"{prefix}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index_file = folder / f"{prefix}.safetensors.index.json"
    index_file.unlink(missing_ok=True)
    with tqdm(total=total, unit="B", unit_scale=True, desc=folder.name) as bar, ThreadPoolExecutor(workers) as pool:
        made = partial(ahead, pool, 2 * workers)
        kept = sum(
            write_shard(folder / name, shard, source, metadata, made, bar.update)
            for name, shard in zip(names, shards, strict=True)
        )
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    for file in old:
        if file.name not in names:
            file.unlink()
    write_json(index_file, {"metadata": {"total_size": total}, "weight_map": weight_map}, durable=True)
    return Written(len(weight_map), total, len(shards), kept)


def written_before(folder: Path, prefix: str) -> list[Path]:
    """The files that an earlier `write_folder` left. Raises ConfigError when another program's are there."""
    files = [file for file in folder.glob(f"{prefix}*.safetensors") if file.is_file()]
    for file in files:
        try:
            ours = "fingerprint" in read_header(file)[1]
        except ConfigError:
            continue  # no weights that anybody could read
        if not ours:
            raise ConfigError(
                f"{folder}: holds {file.name}, which was not written here and would be read in place of the new files "
                "or among them; remove it or give another folder"
            )
    return files


def split(outputs: Iterable[Output], shard_bytes: int) -> list[list[Output]]:
    """Tensors in order, in groups of at most `shard_bytes` where a single tensor is not larger."""
    shards: list[list[Output]] = [[]]
    size = 0
    for tensor in outputs:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def ahead(pool: ThreadPoolExecutor, count: int, pieces: Iterable[Piece]) -> Iterator[np.ndarray]:
    """What `pieces` return, in order; the pool's threads work on `count` of them while one is used."""
    waiting: deque[Future] = deque()
    try:
        for piece in pieces:
            if len(waiting) == count:
                yield waiting.popleft().result()
            waiting.append(pool.submit(piece))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:  # after an error
            future.cancel()


def write_shard(
    path: Path,
    tensors: list[Output],
    source: str,
    metadata: dict[str, str],
    made: Callable[[Iterable[Piece]], Iterator[np.ndarray]],
    advance: Callable[[int], object],
) -> bool:
    """Write one file; return True when it was there already.

    Args:
        made: gives the arrays that pieces return.
        advance: hears of the bytes done.
    """
    layout = layout_of({tensor.name: tensor for tensor in tensors})
    fingerprint = hashlib.sha256(json.dumps([source, layout]).encode()).hexdigest()
    if is_written(path, fingerprint):
        advance(sum(tensor.nbytes for tensor in tensors))
        return True
    with whole_file(path, durable=True) as temporary, DirectFile(temporary) as stream:
        stream.append(np.frombuffer(header_of(layout, {**metadata, "fingerprint": fingerprint}), np.uint8))
        arrays = made(chain.from_iterable(tensor.pieces for tensor in tensors))
        for tensor in tensors:
            start = stream.size
            for array in islice(arrays, len(tensor.pieces)):
                array = np.asarray(array, tensor.dtype)
                stream.append(array)
                advance(array.nbytes)
            if stream.size - start != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {stream.size - start} bytes for shape {tensor.shape}")
    return False


def layout_of(tensors: Mapping[str, Output | np.ndarray]) -> dict[str, dict[str, Any]]:
    """What a header says of tensors that follow it one after the other."""
    layout, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        layout[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return layout


def header_of(layout: dict[str, dict[str, Any]], metadata: dict[str, str]) -> bytes:
    """What stands in a file before the first tensor."""
    header = json.dumps({"__metadata__": metadata, **layout}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def is_written(path: Path, fingerprint: str) -> bool:
    """True when the file is there, whole, and was made from the same source in the same way."""
    try:
        return read_header(path)[1].get("fingerprint") == fingerprint
    except (OSError, ConfigError):
        return False


def files_fingerprint(files: Iterable[Path]) -> str:
    """A text that changes when one of the files is written again: names, sizes, times."""
    marks = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := os.stat(file))]
    return hashlib.sha256(json.dumps(sorted(marks)).encode()).hexdigest()
