"""Compile the ranks of a layout, lower them, and run them as processes of this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.collectives.rank_job import JOB
from mindformers_ext.cpu_parallel.run_rank import rank_folder
from mindformers_ext.errors import UserError
from mindformers_ext.lowering import deadlock
from mindformers_ext.lowering.calls import Call, read_calls
from mindformers_ext.rank_compiler import rank_pool
from mindformers_ext.rank_compiler.rank_server import end_with_parent
from mindformers_ext.rank_compiler.stand_in_cann import COMPILE

POLL_SECONDS, WATCH_SECONDS = 0.05, 0.5
LOWER = "mindformers_ext.lowering.lower:lower_into"  # what is done with a compiled graph
FAILURE = "failure.json"  # what a rank that fails writes: {rank, message, time}
# After the first failure the others stop by themselves within a tenth of a second; this is for those that compute.
GRACE_SECONDS = 1.5
RUN_SECONDS = 1800.0  # for a check's run, after which a rank hangs


class RankError(UserError, RuntimeError):
    """A rank could not be compiled, or failed while it ran; the message names the first one and why."""


@dataclass(frozen=True)
class Builder:
    """What to train: "package.module:function", its keyword arguments, and folders to import from."""

    function: str
    arguments: dict
    python_path: tuple[str, ...] = ()

    module = "mindformers_ext.rank_compiler.compile_rank"  # compiles it, with these arguments

    def module_arguments(self, out: Path) -> list[str]:
        """Arguments of a module of this project that works on it."""
        return ["--builder", self.function, "--arguments", json.dumps(self.arguments), "--out", str(out)]

    def compile_arguments(self, out: Path) -> list[str]:
        return [*self.module_arguments(out), "--rewrite", LOWER]


@dataclass(frozen=True)
class RunBuilder:
    """What `run_mindformer.py arguments` would train; paths in the arguments are absolute."""

    arguments: tuple[str, ...]
    python_path: tuple[str, ...] = ()

    module = "mindformers_ext.rank_compiler.compile_run"

    def compile_arguments(self, out: Path) -> list[str]:
        return ["--whole_model", "--rewrite", LOWER, "--out", str(out), *self.arguments]


def run_reference(builder: Builder, folder: Path) -> dict:
    """Train in a single process; returns its losses and seconds, and fills `folder` for `run_ranks`."""
    command = ["-m", "mindformers_ext.cpu_parallel.reference", *builder.module_arguments(folder)]
    run_child(command, builder.python_path, folder / "log.txt")
    return json.loads((folder / "result.json").read_text())


def compile_ranks(
    builder: Builder | RunBuilder, world_size: int, folder: Path, stages: int = 1, workers: int | None = None
) -> list[list[Call]]:
    """Compile and lower every rank into `folder/rank_R`; returns their collectives, as `lowered` does."""
    jobs = rank_jobs(builder, world_size, folder, stages)
    return lowered(jobs, rank_pool.compile_ranks(jobs, list(range(world_size)), workers or os.cpu_count() or 1))


def rank_jobs(builder: Builder | RunBuilder, world_size: int, folder: Path, stages: int) -> rank_pool.RankJobs:
    """How all ranks are compiled and lowered into `folder/rank_R`."""
    return rank_pool.RankJobs(
        module=builder.module,
        arguments=builder.compile_arguments,
        world_size=world_size,
        devices_per_stage=world_size // stages,
        out=folder,
        level=COMPILE,
        python_path=builder.python_path,
        environment={"OMP_NUM_THREADS": "1"} | bytecode_cache(),
    )


def lowered(jobs: rank_pool.RankJobs, results: Iterable[rank_pool.RankResult]) -> list[list[Call]]:
    """The collectives of all ranks once they are compiled, proved free of deadlocks.

    Raises RankError with the compiler's message and deadlock.DeadlockError.
    """
    for result in results:
        if result.status != rank_pool.COMPILED:
            reasons = "; ".join([result.message, *result.compiler_errors[:1]])
            raise RankError(f"rank {result.rank} does not compile: {reasons} (log {result.log})")
    sequences = [read_calls(rank_folder(jobs.out, rank) / "calls.json") for rank in range(jobs.world_size)]
    deadlock.check(sequences)
    return sequences


def bytecode_cache() -> dict[str, str]:
    """Environment of children where the user's forbids bytecode beside the sources: a folder of its own for it.

    Without any, each process of a job compiles MindSpore's and MindFormers' sources again, nine seconds of its start.
    """
    if not os.environ.get("PYTHONDONTWRITEBYTECODE"):
        return {}
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindformers_ext" / "bytecode"
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX") or str(cache)}


def run_ranks(folder: Path, world_size: int, stages: int = 1) -> list[dict]:
    """Run all lowered ranks; returns what each wrote to `result.json`.

    The first rank that fails stops all others within seconds: raises RankError that names it.
    """
    job = uuid.uuid4().hex

    def start(rank: int) -> subprocess.Popen:
        own = rank_folder(folder, rank)
        command = ["-m", "mindformers_ext.cpu_parallel.run_rank", "--folder", str(folder)]
        command += ["--rank", str(rank), "--world_size", str(world_size), "--stages", str(stages)]
        return start_rank(command, quiet(os.environ | {JOB: job}), own / FAILURE, own / "run.log")

    def explain(rank: int, code: int) -> tuple[float, str]:
        own = rank_folder(folder, rank)
        return failure_of(own / FAILURE, own / "run.log", rank, code)

    supervise([start(rank) for rank in range(world_size)], explain)
    return [json.loads((rank_folder(folder, rank) / "result.json").read_text()) for rank in range(world_size)]


def run_forked(pool: rank_pool.RankPool, jobs: rank_pool.RankJobs) -> None:
    """Run processes that `pool` forks, to their end. Raises RankError that names the first one that failed.

    They stop each other through their collectives.
    """
    ranks = list(range(jobs.world_size))
    for rank in ranks:
        (rank_folder(jobs.out, rank) / FAILURE).unlink(missing_ok=True)
    pool.submit(jobs, ranks)
    failed = {rank: (folder, code, seconds) for rank, folder, code, seconds in pool.ends(jobs, ranks) if code != 0}
    if failed:
        explained = {rank: _end_of(folder, rank, code, seconds) for rank, (folder, code, seconds) in failed.items()}
        first = min(explained, key=lambda rank: explained[rank][0])
        raise RankError(f"rank {first} failed first: {explained[first][1]}")


def _end_of(folder: Path, rank: int, code: int | None, seconds: float) -> tuple[float, str]:
    """As `failure_of`, of a process that was forked; code None where it took too long."""
    log = folder / rank_pool.LOG
    if code is None:
        return time.time(), f"no end after {seconds:.0f} s; its log is {log}"
    told, sentence = failure_of(folder / FAILURE, log, rank, code)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    return told, "; ".join([sentence, *lines])


def start_rank(command: list[str], environment: dict[str, str], failure: Path, log: Path) -> subprocess.Popen:
    """Start `python command` as a rank's process, which dies with this one; it writes `failure` when it fails."""
    failure.unlink(missing_ok=True)
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )


class Follower:
    """Hands on the lines that match `pattern`, its first group, as the logs grow; what several say, once."""

    def __init__(self, logs: Sequence[Path], pattern: re.Pattern, say: Callable[[str], None]):
        self.streams = [log.open(encoding="utf-8", errors="replace") for log in logs]
        self.unfinished = [""] * len(logs)
        self.pattern, self.say, self.said = pattern, say, set()

    def read(self) -> None:
        """Take what is new."""
        for index, stream in enumerate(self.streams):
            *lines, self.unfinished[index] = (self.unfinished[index] + stream.read()).split("\n")
            for match in filter(None, map(self.pattern.search, lines)):
                if match[1] not in self.said:
                    self.said.add(match[1])
                    self.say(match[1])


def supervise(
    processes: list[subprocess.Popen],
    explain: Callable[[int, int], tuple[float, str]],
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Wait for all processes; when one fails, give the others GRACE_SECONDS, kill them and raise RankError.

    `explain(rank, exit code)` returns when the rank failed and why; `watch()` is called now and then while they run,
    and once after.
    """
    try:
        first_noticed = None
        watched = time.monotonic()
        while None in (codes := [process.poll() for process in processes]):
            if first_noticed is None and any(codes):
                first_noticed = time.monotonic()
            if first_noticed is not None and time.monotonic() - first_noticed > GRACE_SECONDS:
                break
            if time.monotonic() - watched > WATCH_SECONDS:
                watched = time.monotonic()
                watch()
            time.sleep(POLL_SECONDS)
        failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        watch()
    if failed:
        # A rank that was killed wrote nothing and is the cause; otherwise the earliest failure is.
        explained = {rank: explain(rank, code) for rank, code in failed}
        first = min(explained, key=lambda rank: explained[rank][0])
        raise RankError(f"rank {first} failed first: {explained[first][1]}")


def failure_of(failure: Path, log: Path, rank: int, code: int) -> tuple[float, str]:
    """(time, sentence) of a failed rank; one that was killed left no sentence and counts as the earliest."""
    if failure.exists():
        told = json.loads(failure.read_text())
        return told["time"], told["message"].removeprefix(f"rank {rank}: ")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return 0.0, f"{how}; its log is {log}"


def quiet(environment: dict[str, str]) -> dict[str, str]:
    """One computing thread per process unless the user chose, and errors only in the logs."""
    return {"OMP_NUM_THREADS": "1", "GLOG_v": "3"} | environment | bytecode_cache()


def run_child(command: list[str], python_path: Sequence[str], log: Path) -> None:
    """Run `python command` to its end. Raises RankError with the end of its log."""
    environment = quiet(os.environ.copy())
    environment["PYTHONPATH"] = os.pathsep.join([*python_path, *filter(None, [environment.get("PYTHONPATH")])])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=stream, stderr=stream, preexec_fn=end_with_parent
        )
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        tail = [line for line in lines if line.startswith("error: ")] or lines[-15:]
        raise RankError(f"{command[1]} failed with exit code {done.returncode} (log {log}):\n" + "\n".join(tail))
