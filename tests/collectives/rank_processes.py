"""Run a function as the ranks of a job, in forked processes, and collect what each returned or raised."""

import multiprocessing
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from mindformers_ext.collectives import collectives


def _rank_main(function: Callable, job: str, rank: int, size: int, options: dict, pipe) -> None:
    try:
        collectives.join(job, rank, size, **options)
        result = ("result", function(rank, size))
        collectives.leave()
    except BaseException as error:  # the parent decides what a failure means
        collectives.abort(f"{type(error).__name__}: {error}")
        result = ("error", f"{error}")
    pipe.send(result)
    pipe.close()


def run_ranks(
    size: int, function: Callable[[int, int], Any], missing: tuple[int, ...] = (), limit: float = 60, **options: Any
) -> dict[int, tuple[str, Any]]:
    """{rank: ("result", value) | ("error", sentence) | ("died", exit code)} of `function(rank, size)`."""
    context = multiprocessing.get_context("fork")
    job = options.pop("job", None) or f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    workers = {}
    for rank in range(size):
        if rank in missing:
            continue
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(function, job, rank, size, options, writer))
        process.start()
        writer.close()
        workers[rank] = (process, reader)
    deadline = time.monotonic() + limit
    outcome = {}
    for rank, (process, reader) in workers.items():
        try:
            outcome[rank] = reader.recv() if reader.poll(max(0.1, deadline - time.monotonic())) else ("hung", None)
        except EOFError:
            process.join(5)
            outcome[rank] = ("died", process.exitcode)
    for process, _ in workers.values():
        process.kill()
        process.join()
    return outcome


def results(outcome: dict[int, tuple[str, Any]]) -> list[Any]:
    """The values of all ranks; fails when any rank did not return."""
    failed = {rank: what for rank, what in outcome.items() if what[0] != "result"}
    assert not failed, failed
    return [outcome[rank][1] for rank in sorted(outcome)]
