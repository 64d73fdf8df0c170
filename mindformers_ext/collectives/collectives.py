"""Collectives between the processes of one machine, over shared memory (the library built from collectives.cc).

The same library runs inside MindSpore graphs as an AOT Custom operator; here it takes numpy arrays: for tests,
benchmarks and the few exchanges that a run makes outside its graph. All failures raise CollectiveError with one
sentence that names the rank, its peer and the operation.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mindformers_ext.built_library import built_library

# Long enough for slow imports on a busy machine, short enough that a missing peer is reported within 30 s.
JOIN_SECONDS = 20.0
# A peer that is alive may compile or write a checkpoint; one that dies is noticed at once, whatever this says.
WAIT_SECONDS = 600.0
NOTHING = np.empty(0, np.uint8)


class CollectiveError(RuntimeError):
    """A collective failed, or another rank did."""


def library_path() -> Path:
    """Path of the shared library; raises ImportError when the project was installed without its extensions."""
    return built_library(Path(__file__).parent, "_collectives")


@functools.cache
def _lib() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path()))
    library.cpu_parallel_last_error.restype = ctypes.c_char_p
    return library


def last_error() -> str:
    """The sentence of this process's last failed collective, or an empty string."""
    return _lib().cpu_parallel_last_error().decode(errors="replace")


def _check(code: int) -> None:
    if code != 0:
        raise CollectiveError(last_error())


def join(job: str, rank: int, size: int, join_seconds: float = JOIN_SECONDS, wait_seconds: float | None = None) -> None:
    """Join a job as one of `size` ranks; returns when all have joined.

    Raises CollectiveError when a rank is missing after `join_seconds`. Later operations give up after `wait_seconds`
    (default: the environment variable CPU_PARALLEL_WAIT_SECONDS, or 600), or at once when a peer has died.
    """
    if wait_seconds is None:
        wait_seconds = float(os.environ.get("CPU_PARALLEL_WAIT_SECONDS", WAIT_SECONDS))
    seconds = ctypes.c_double(join_seconds), ctypes.c_double(wait_seconds)
    _check(_lib().cpu_parallel_join(job.encode(), _int("rank", rank), _int("size", size), *seconds))


def leave() -> None:
    """End this rank's part in the job normally; a peer that still waits for it gets an error."""
    _lib().cpu_parallel_leave()


def abort(message: str) -> None:
    """Stop all other ranks with `message` (within 0.1 s when they wait in a collective)."""
    _lib().cpu_parallel_abort(message.encode())


@functools.cache
def _members(ranks: tuple[int, ...]) -> tuple[ctypes.Array, int]:
    return (ctypes.c_int * len(ranks))(*(_int("a rank", rank) for rank in ranks)), len(ranks)


def _int(name: str, value: int, bits: int = 32) -> int:
    """The value; ctypes would cut a number that C cannot hold."""
    if not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise ValueError(f"{name} is {value}, which has more than {bits} bits")
    return value


def _counts(name: str, counts: Sequence[int], ranks: Sequence[int]) -> ctypes.Array:
    if len(counts) != len(ranks):
        raise ValueError(f"{name} has {len(counts)} numbers, but there are {len(ranks)} ranks")
    return (ctypes.c_int64 * len(counts))(*(_int(name, count, 64) for count in counts))


def _data(array: np.ndarray) -> ctypes.c_void_p:
    if not array.flags.c_contiguous:
        raise ValueError("collectives need contiguous arrays")
    return ctypes.c_void_p(array.__array_interface__["data"][0])


@functools.cache
def _type(dtype: np.dtype) -> bytes:
    if not dtype.isnative:
        raise ValueError(f"collectives need numbers in this machine's byte order, not {dtype}")
    return dtype.name.encode()


@functools.cache
def _shape(shape: tuple[int, ...]) -> ctypes.Array:
    return (ctypes.c_int64 * len(shape))(*shape)


def _run(
    collective: bytes,
    array: np.ndarray,
    out: np.ndarray,
    ranks: Sequence[int] = (),
    reduce: str = "sum",
    dimensions: tuple[int, int] = (0, 0),
    root: int = -1,
    peer: int = -1,
    tag: int = 0,
    counts: tuple[ctypes.Array | None, ctypes.Array | None] = (None, None),
) -> np.ndarray:
    """Run a collective on `array`; returns `out`, filled."""
    places = _int("root", root), _int("peer", peer), ctypes.c_int64(_int("tag", tag, 64))
    settings = (_type(array.dtype), reduce.encode(), *_members(tuple(ranks)), *dimensions, *places, *counts)
    data = _shape(array.shape), array.ndim, _data(array), _data(out), ctypes.c_int64(out.size)
    _check(_lib().cpu_parallel_run(collective, *settings, *data))
    return out


def all_reduce(array: np.ndarray, ranks: Sequence[int], reduce: str = "sum") -> np.ndarray:
    """Reduce (sum, prod, max, min) over the ranks, in rank order: the same bits on every rank."""
    return _run(b"AllReduce", array, np.empty_like(array), ranks, reduce)


def all_gather(array: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """(n, *shape) <- (*shape): the arrays of all ranks."""
    return _run(b"AllGather", array, np.empty((len(ranks), *array.shape), array.dtype), ranks)


def reduce_scatter(array: np.ndarray, ranks: Sequence[int], reduce: str = "sum") -> np.ndarray:
    """(s / n, ...) <- (s, ...): this rank's part of the reduction."""
    if not len(ranks) or array.ndim == 0 or array.shape[0] % len(ranks):
        raise ValueError(f"dimension 0 of {array.shape} must be a multiple of the {len(ranks)} ranks")
    out = np.empty((array.shape[0] // len(ranks), *array.shape[1:]), array.dtype)
    return _run(b"ReduceScatter", array, out, ranks, reduce)


def all_to_all(array: np.ndarray, ranks: Sequence[int], split: int, concat: int) -> np.ndarray:
    """Split dimension `split` into n parts, one for each rank; join what arrives along dimension `concat`."""
    shape, dimensions = list(array.shape), range(-array.ndim, array.ndim)
    if not len(ranks) or split not in dimensions or concat not in dimensions or shape[split] % len(ranks):
        raise ValueError(
            f"{array.shape} cannot be split along dimension {split} into {len(ranks)} equal parts that are joined "
            f"along dimension {concat}"
        )
    shape[split] //= len(ranks)
    shape[concat] *= len(ranks)
    return _run(b"AlltoAll", array, np.empty(shape, array.dtype), ranks, dimensions=(split, concat))


def all_to_all_v(
    array: np.ndarray, ranks: Sequence[int], send_counts: Sequence[int], recv_counts: Sequence[int]
) -> np.ndarray:
    """Send send_counts[i] elements of the flat array to rank i, receive recv_counts[i] from it."""
    counts = _counts("send_counts", send_counts, ranks), _counts("recv_counts", recv_counts, ranks)
    return _run(b"AlltoAllV", array, np.empty(max(sum(recv_counts), 0), array.dtype), ranks, counts=counts)


def broadcast(array: np.ndarray, ranks: Sequence[int], root: int) -> np.ndarray:
    """The array of rank `root` (a global rank)."""
    return _run(b"Broadcast", array, np.empty_like(array), ranks, root=root)


def barrier(ranks: Sequence[int]) -> None:
    """Wait until every rank has arrived."""
    _run(b"Barrier", NOTHING, NOTHING, ranks)


def send(array: np.ndarray, peer: int, tag: int = 0) -> None:
    """Send an array; returns when it is buffered (two messages of one tag at most)."""
    _run(b"Send", array, NOTHING, peer=peer, tag=tag)


def receive(like: np.ndarray, peer: int, tag: int = 0) -> np.ndarray:
    """Receive an array of the shape and type of `like`."""
    return _run(b"Receive", like, np.empty_like(like), peer=peer, tag=tag)
