"""The shared-memory collectives against numpy, bit by bit, on 2, 3, 4 and 8 processes and all their sub-groups."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from collectives.rank_processes import results, run_ranks

from mindformers_ext.collectives import collectives

SIZES = (2, 3, 4, 8)
# Odd sizes: one element, not a multiple of the vector width, one off a slot (1 MiB), several slots.
COUNTS = (1, 7, 1000, 4097, 262_143, 600_001)
REDUCE = {"sum": np.add, "prod": np.multiply, "max": np.maximum, "min": np.minimum}


def values(rank: int, count: int, dtype: str, seed: int = 0) -> np.ndarray:
    """What rank `rank` contributes; every rank can compute every other rank's."""
    rng = np.random.default_rng((seed, rank, count))
    if np.dtype(dtype).kind in "iu":
        return rng.integers(1, 5, count).astype(dtype)
    return (rng.standard_normal(count) * 10 ** rng.uniform(-3, 3, count)).astype(np.float32).astype(dtype)


def reduced(parts: list[np.ndarray], how: str) -> np.ndarray:
    """The reduction in rank order; half types accumulate in float32."""
    dtype = parts[0].dtype
    wide = np.float32 if dtype.itemsize == 2 and dtype.kind not in "iu" else dtype
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = REDUCE[how](total, part.astype(wide), dtype=wide)
    return total.astype(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


def subgroups(size: int) -> list[tuple[int, ...]]:
    return [ranks for n in range(2, size + 1) for ranks in itertools.combinations(range(size), n)]


def check_group(ranks: tuple[int, ...], rank: int, count: int) -> list[str]:
    """Names of the collectives that differ from numpy for one group and size."""
    n, me, wrong = len(ranks), ranks.index(rank), []
    parts = [values(r, count, "float32") for r in ranks]
    own = parts[me]

    def check(name: str, got: np.ndarray, want: np.ndarray) -> None:
        if not same_bits(got, want):
            wrong.append(f"{name} of {count} in {ranks}")

    check("AllReduce", collectives.all_reduce(own, ranks), reduced(parts, "sum"))
    check("AllGather", collectives.all_gather(own, ranks), np.stack(parts))
    big = [values(r, count * n, "float32", 1) for r in ranks]
    check("ReduceScatter", collectives.reduce_scatter(big[me], ranks), reduced(big, "sum").reshape(n, -1)[me])
    check("Broadcast", collectives.broadcast(own, ranks, ranks[-1]), parts[-1])
    cubes = [part.reshape(1, n, count) for part in big]
    want = np.concatenate([np.split(cube, n, axis=1)[me] for cube in cubes], axis=2)
    check("AlltoAll", collectives.all_to_all(cubes[me], ranks, 1, 2), want)
    counts = np.random.default_rng((3, count)).integers(0, count + 1, (n, n))  # [from][to]
    sent = [values(r, int(counts[i].sum()), "float32", 2) for i, r in enumerate(ranks)]
    got = collectives.all_to_all_v(sent[me], ranks, counts[me].tolist(), counts[:, me].tolist())
    cut = [np.split(part, np.cumsum(counts[i])[:-1])[me] for i, part in enumerate(sent)]
    check("AlltoAllV", got, np.concatenate(cut))
    return wrong


@pytest.mark.parametrize("size", SIZES)
def test_every_collective_in_every_subgroup(size):
    """All sub-groups of 2, 3, 4 and 8 processes, small and odd sizes; groups interleave on the same ranks."""
    counts = (1, 7, 1000) if size < 8 else (5,)

    def body(rank, _):
        return [w for group in subgroups(size) if rank in group for c in counts for w in check_group(group, rank, c)]

    assert sum(results(run_ranks(size, body)), []) == []


@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_and_above_a_slot(size):
    counts = COUNTS[3:] if size < 8 else COUNTS[3:5]
    everyone = tuple(range(size))

    def body(rank, _):
        return [w for count in counts for w in check_group(everyone, rank, count)]

    assert sum(results(run_ranks(size, body)), []) == []


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int16", "int32", "int64"]
)
def test_types_and_reductions(dtype):
    """Every type and reduction, three processes: half types are accumulated in float32 and rounded once."""
    storage = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    ranks = (0, 1, 2)

    def body(rank, _):
        wrong = []
        for how, count in itertools.product(REDUCE, (1, 515, 30_001)):
            parts = [values(r, count, storage) for r in ranks]
            big = [values(r, count * 3, storage, 1) for r in ranks]
            got = collectives.all_reduce(parts[rank], ranks, how)
            scattered = collectives.reduce_scatter(big[rank], ranks, how)
            with np.errstate(over="ignore"):
                if not same_bits(got, reduced(parts, how)):
                    wrong.append(("AllReduce", how, count))
                if not same_bits(scattered, reduced(big, how).reshape(3, -1)[rank]):
                    wrong.append(("ReduceScatter", how, count))
        return wrong

    assert sum(results(run_ranks(3, body)), []) == []


def test_bool_and_nan():
    def body(rank, _):
        flags = np.array([rank == 0, True, False])
        nan = np.array([np.nan, 1.0, 2.0] if rank else [0.0, np.nan, 3.0], np.float32)
        any_, all_ = (collectives.all_reduce(flags, (0, 1), how).tolist() for how in ("max", "min"))
        return any_, all_, np.isnan(collectives.all_reduce(nan, (0, 1), "max")).tolist()

    expected = ([True, True, False], [False, True, False], [True, True, False])
    assert results(run_ranks(2, body)) == [expected, expected]


def test_all_to_all_dimensions():
    """Every pair of split and concat dimensions of a rank-4 tensor."""
    shape = (4, 8, 4, 12)

    def body(rank, size):
        cubes = [values(r, int(np.prod(shape)), "float32").reshape(shape) for r in range(size)]
        wrong = []
        for split, concat in itertools.product(range(-4, 4), range(4)):
            want = np.concatenate([np.split(cube, size, axis=split)[rank] for cube in cubes], axis=concat)
            if not same_bits(collectives.all_to_all(cubes[rank], range(size), split, concat), want):
                wrong.append((split, concat))
        return wrong

    assert sum(results(run_ranks(4, body)), []) == []


def test_send_and_receive_keep_their_order():
    """Two tags each way between three ranks; the receiver takes the tags in another order than they were sent."""

    def body(rank, size):
        right, left = (rank + 1) % size, (rank - 1) % size
        for step in range(50):
            collectives.send(values(rank, 999, "float32", step), right, tag=0)
            collectives.send(values(rank, 5, "int64", step), right, tag=1)
            small = collectives.receive(np.empty(5, np.int64), left, tag=1)
            large = collectives.receive(np.empty(999, np.float32), left, tag=0)
            assert same_bits(small, values(left, 5, "int64", step))
            assert same_bits(large, values(left, 999, "float32", step))

    results(run_ranks(3, body))


def test_ten_thousand_rounds():
    """No hang and no mix-up in 10,000 rounds of changing operations, groups and sizes on four processes."""
    groups = [(0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]

    def body(rank, _):
        wrong = 0
        for step in range(10_000):
            for group in (groups[0],) if step % 3 == 0 else groups[1 + 2 * (step % 3) : 3 + 2 * (step % 3)]:
                if rank not in group:
                    continue
                own = np.full(1 + step % 37, rank + step, np.int64)
                total = collectives.all_reduce(own, group)
                wrong += int((total != sum(group) + step * len(group)).any())
                if step % 7 == 0:
                    wrong += int((collectives.all_gather(own, group)[:, 0] != np.array(group) + step).any())
        return wrong

    assert results(run_ranks(4, body, limit=120)) == [0, 0, 0, 0]
