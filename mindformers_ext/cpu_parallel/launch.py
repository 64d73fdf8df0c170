"""Compile the ranks of a layout, lower them, and run them as processes of this machine."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mindformers_ext.cpu_parallel import deadlock
from mindformers_ext.cpu_parallel.lowering import Call, lower
from mindformers_ext.cpu_parallel.run_rank import rank_folder
from mindformers_ext.dryrun.mindir import load_model
from mindformers_ext.dryrun.stand_in_cann import COMPILE, ascend_environment

POLL_SECONDS = 0.05
# After the first failure the others stop by themselves within a tenth of a second; this is for those that compute.
GRACE_SECONDS = 10.0


class RankError(RuntimeError):
    """A rank could not be compiled, or failed while it ran; the message names the first one and why."""


@dataclass(frozen=True)
class Builder:
    """What to train: "package.module:function", its keyword arguments, and folders to import from."""

    function: str
    arguments: dict
    python_path: tuple[str, ...] = ()

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        folders = [*self.python_path, *filter(None, [base.get("PYTHONPATH")])]
        return base | {"PYTHONPATH": os.pathsep.join(folders)}

    def command(self, module: str, out: Path) -> list[str]:
        return [sys.executable, "-m", module, "--builder", self.function] + [
            "--arguments",
            json.dumps(self.arguments),
            "--out",
            str(out),
        ]


def end_with_parent() -> None:
    """In a child: ask the kernel to kill this process when its parent dies, so that no rank is ever left behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run_reference(builder: Builder, folder: Path) -> dict:
    """Train in a single process; returns its losses and seconds, and fills `folder` for `run_ranks`."""
    environment = builder.environment(_quiet(os.environ.copy()))
    _run_child(builder.command("mindformers_ext.cpu_parallel.reference", folder), environment, folder / "single.log")
    return json.loads((folder / "single.json").read_text())


def compile_ranks(builder: Builder, world_size: int, folder: Path, workers: int | None = None) -> list[list[Call]]:
    """Compile and lower every rank into `folder/rank_R`; returns their collectives, proved free of deadlocks.

    Raises RankError with the compiler's message and deadlock.DeadlockError.
    """

    def compile_one(rank: int) -> None:
        own = rank_folder(folder, rank)
        own.mkdir(parents=True, exist_ok=True)
        environment = builder.environment(_quiet(ascend_environment(rank, world_size, COMPILE)))
        environment["CPU_PARALLEL_COMPILE"] = "1"  # the model then uses operators that CPU has
        _run_child(builder.command("mindformers_ext.dryrun.compile_rank", own), environment, own / "compile.log")

    ascend_environment(0, world_size, COMPILE)  # builds the stand-in libraries once, before the threads ask for them
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        list(pool.map(compile_one, range(world_size)))
    return lower_ranks(world_size, folder)


def lower_ranks(world_size: int, folder: Path) -> list[list[Call]]:
    """Lower the compiled graphs of all ranks and check that their collectives fit together."""
    sequences = []
    for rank in range(world_size):
        own = rank_folder(folder, rank)
        model = load_model((own / "graph.mindir").read_bytes())
        sequences.append(lower(model, rank, world_size))
        (own / "cpu.mindir").write_bytes(model.SerializeToString())
    deadlock.check(sequences)
    return sequences


def run_ranks(folder: Path, world_size: int, stages: int = 1) -> list[dict]:
    """Run all lowered ranks; returns what each wrote to `result.json`.

    The first rank that fails stops all others within seconds: raises RankError that names it.
    """
    job = uuid.uuid4().hex
    environment = _quiet(os.environ.copy())

    def start(rank: int) -> subprocess.Popen:
        own = rank_folder(folder, rank)
        (own / "failure.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "mindformers_ext.cpu_parallel.run_rank", "--folder", str(folder)]
        command += ["--rank", str(rank), "--world_size", str(world_size), "--stages", str(stages), "--job", job]
        with (own / "run.log").open("wb") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, preexec_fn=end_with_parent, stdin=subprocess.DEVNULL
            )

    supervise([start(rank) for rank in range(world_size)], lambda rank, code: failure_of(folder, rank, code))
    return [json.loads((rank_folder(folder, rank) / "result.json").read_text()) for rank in range(world_size)]


def supervise(processes: list[subprocess.Popen], explain: Callable[[int, int], tuple[float, str]]) -> None:
    """Wait for all processes; when one fails, give the others GRACE_SECONDS, kill them and raise RankError.

    `explain(rank, exit code)` returns when the rank failed and why.
    """
    try:
        first_noticed = None
        while None in (codes := [process.poll() for process in processes]):
            if first_noticed is None and any(codes):
                first_noticed = time.monotonic()
            if first_noticed is not None and time.monotonic() - first_noticed > GRACE_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        failed = [(rank, process.returncode) for rank, process in enumerate(processes) if process.returncode]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if failed:
        # A rank that was killed wrote nothing and is the cause; otherwise the earliest failure is.
        explained = {rank: explain(rank, code) for rank, code in failed}
        first = min(explained, key=lambda rank: explained[rank][0])
        raise RankError(f"rank {first} failed first: {explained[first][1]}")


def failure_of(folder: Path, rank: int, code: int) -> tuple[float, str]:
    """(time, sentence) of a failed rank; one that was killed left no sentence and counts as the earliest."""
    path = rank_folder(folder, rank) / "failure.json"
    if path.exists():
        failure = json.loads(path.read_text())
        return failure["time"], failure["message"].removeprefix(f"rank {rank}: ")
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return 0.0, f"{how}; its log is {rank_folder(folder, rank) / 'run.log'}"


def _quiet(environment: dict[str, str]) -> dict[str, str]:
    """One computing thread per process unless the user chose, and errors only in the logs."""
    return {"OMP_NUM_THREADS": "1", "GLOG_v": "3"} | environment


def _run_child(command: list[str], environment: dict[str, str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        done = subprocess.run(command, env=environment, stdout=stream, stderr=stream, preexec_fn=end_with_parent)
    if done.returncode:
        tail = log.read_text(errors="replace").strip().splitlines()[-15:]
        raise RankError(f"{command[2]} failed with exit code {done.returncode} (log {log}):\n" + "\n".join(tail))
