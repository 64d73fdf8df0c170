"""Time collectives by size and group, and check what they give: one process of several.

    msrun --worker_num N --local_worker_num N --join True mindformers_ext/first_hour/collective_times.py FILE   (cards)

`on_cpu(ranks)` does the same with processes over our shared memory. FILE gets a list of records: operation, group,
bytes (of the whole tensor), seconds, right.
"""

import json
import multiprocessing
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CARD_SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
CPU_SIZES = (1 << 10, 1 << 16, 1 << 20)
RUNS = 10
OPERATIONS = ("AllReduce", "AllGather", "ReduceScatter", "AlltoAll")


def groups(ranks: int) -> list[int]:
    """Sizes of groups of neighbours: 2, 4, ... and all."""
    return sorted({2**i for i in range(1, ranks.bit_length()) if ranks % 2**i == 0} | {ranks} - {1})


def put_in(operation: str, size: int, group: int, rank: int) -> np.ndarray:
    """What a rank gives, so that the whole tensor has `size` bytes: its number within the group, plus one."""
    elements = max(size // 4 // group, 1) * (1 if operation == "AllGather" else group)
    return np.full(elements, rank % group + 1, np.float32)


def is_right(operation: str, result: np.ndarray, group: int) -> bool:
    """Whether the result follows from what all have put in."""
    if operation in ("AllReduce", "ReduceScatter"):
        return bool(np.all(result == group * (group + 1) // 2))
    return bool(np.all(result.reshape(group, -1) == np.arange(1, group + 1)[:, None]))


def measured(
    ranks: int, rank: int, sizes: tuple[int, ...], call_of: Callable, given: Callable, settle: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """Records of all operations, groups and sizes.

    `call_of(operation, group)` gives a function of what `given(array)` makes; `settle` waits until all calls are done.
    """
    for group in groups(ranks):
        for operation in OPERATIONS:
            call = call_of(operation, group)
            for size in sizes:
                array = given(put_in(operation, size, group, rank))
                right = is_right(operation, np.asarray(call(array)), group)
                spent = []
                for _ in range(RUNS):
                    settle()
                    start = time.perf_counter()
                    call(array)
                    settle()
                    spent.append(time.perf_counter() - start)
                known = {"operation": operation, "group": group, "bytes": size}
                yield known | {"seconds": statistics.median(spent), "right": right}


def on_card(path: Path) -> None:
    """This process of several, each with a card."""
    import mindspore as ms
    from mindspore import nn, ops
    from mindspore.communication import create_group, get_group_size, get_rank, init

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    ranks, rank = get_group_size(), get_rank()

    class One(nn.Cell):
        def __init__(self, operator):
            super().__init__()
            self.operator = operator

        def construct(self, x):
            return self.operator(x)

    def call_of(operation: str, group: int) -> Callable:
        first = rank // group * group
        name = f"first_hour_{operation}_{first}_{group}"
        create_group(name, list(range(first, first + group)))
        shape = {"split_count": group, "split_dim": 0, "concat_dim": 0} if operation == "AlltoAll" else {}
        return One(getattr(ops, operation)(group=name, **shape))

    records = list(measured(ranks, rank, CARD_SIZES, call_of, ms.Tensor, ms.runtime.synchronize))
    if rank == 0:
        path.write_text(json.dumps(records))


def on_cpu(ranks: int, sizes: tuple[int, ...] = CPU_SIZES) -> list[dict[str, Any]]:
    """Records of `ranks` processes over shared memory."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    job = f"first-hour-{uuid.uuid4().hex}"
    workers = [context.Process(target=_cpu_rank, args=(job, rank, ranks, sizes, writer)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    writer.close()
    try:
        return reader.recv()
    finally:
        for worker in workers:
            worker.join()


def _cpu_rank(job: str, rank: int, ranks: int, sizes: tuple[int, ...], pipe) -> None:
    from mindformers_ext.collectives import collectives

    collectives.join(job, rank, ranks)

    def call_of(operation: str, group: int) -> Callable:
        members = range(rank // group * group, rank // group * group + group)
        return {
            "AllReduce": lambda array: collectives.all_reduce(array, members),
            "AllGather": lambda array: collectives.all_gather(array, members),
            "ReduceScatter": lambda array: collectives.reduce_scatter(array, members),
            "AlltoAll": lambda array: collectives.all_to_all(array, members, 0, 0),
        }[operation]

    records = list(measured(ranks, rank, sizes, call_of, np.asarray, lambda: None))
    collectives.leave()
    if rank == 0:
        pipe.send(records)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    on_card(Path(sys.argv[1]))
