"""AlltoAllV and AlltoAllVC of user code, compiled for Ascend, lowered and run by two processes."""

from pathlib import Path

import numpy as np
from cpu_parallel.uneven_exchange import DIGITS

from mindformers_ext.cpu_parallel import launch
from mindformers_ext.cpu_parallel.run_rank import write_batches

TESTS = Path(__file__).parents[1]


def number(*digits: float) -> float:
    return float(DIGITS[: len(digits)] @ np.array(digits, np.float32))


def test_parts_arrive_in_order(tmp_path):
    builder = launch.Builder("cpu_parallel.uneven_exchange:build", {}, (str(TESTS.parent), str(TESTS)))
    calls = launch.compile_ranks(builder, 2, tmp_path)
    assert [(call.operation, call.detail) for call in calls[0]] == [
        ("AlltoAllV", ((1, 2), (1, 2))),
        ("AlltoAllV", ((0, 3), (0, 2))),
    ]
    np.savez(tmp_path / "initial.npz")
    write_batches(tmp_path, [[np.arange(1, 4, dtype=np.float32)]])
    first, second = launch.run_ranks(tmp_path, 2)
    # rank 0 holds 1 2 3, rank 1 holds 4 5 6
    assert first["outputs"] == [[number(1, 4, 5), number(4, 5)]]
    assert second["outputs"] == [[number(2, 3, 6), number(1, 2, 3, 6)]]
