"""Compile many ranks in child processes: one folder and one log a rank, a failure of one never stops the others."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mindformers_ext.rank_compiler import rank_server
from mindformers_ext.rank_compiler.stand_in_cann import ascend_environment

COMPILED, REFUSED, KILLED, TIMED_OUT = "compiled", "refused", "killed", "timed out"
# The compiler's own reason: "[ERROR] PARALLEL(...) [file.cc:12] Function] text". Missing CANN parts are expected.
COMPILER_ERROR = re.compile(r"^\[(?:ERROR|CRITICAL)\] (?!ME\b)\w+\(.*?\[[^\]]*\] \w+\] ?(.+)$", re.MULTILINE)
MEMORY_LINES = {
    "device_bytes": re.compile(r"Device MOC memory size: (\d+)M"),
    "used_peak_bytes": re.compile(r"Used peak memory usage \(without fragments\): (\d+)M"),
    "actual_peak_bytes": re.compile(r"Actual peak memory usage \(with fragments\): (\d+)M"),
}
LAST_LOG_LINES = 20
OUT_OF_MEMORY = "; the machine may be out of memory: use fewer --jobs"
LOG = "log.txt"  # in the folder of each rank, and of the process that they are forked from


@dataclass
class RankResult:
    """What became of one rank."""

    rank: int
    stage: int
    status: str  # COMPILED, REFUSED (by the model or the compiler), KILLED or TIMED_OUT
    seconds: float
    log: str  # path of the child's output
    message: str = ""  # why it did not compile
    source_lines: list[str] = field(default_factory=list)  # of the model, the innermost first
    compiler_errors: list[str] = field(default_factory=list)
    compiled: dict[str, Any] = field(default_factory=dict)  # as `compile_rank.compile_cell` returns
    memory: dict[str, int] = field(default_factory=dict)  # planned by MindSpore, level memory only

    def to_json(self) -> dict[str, Any]:
        """This record for the report, without the long tables that stay in the rank's own folder."""
        data = asdict(self)
        for table in ("strategies", "parameters", "layouts", "audit", "operators"):
            data["compiled"].pop(table, None)
        return data


@dataclass(frozen=True)
class RankJobs:
    """How the ranks of one cluster are compiled."""

    module: str  # its `main` writes a rank's results into a folder, see rank_server.py
    arguments: Callable[[Path], list[str]]  # of `main`, from the folder
    world_size: int
    devices_per_stage: int
    out: Path
    level: int | None  # None in an environment without stand-in libraries, where ranks run
    timeout_seconds: float = 3600.0
    python_path: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)  # added to the children's
    own_environment: Callable[[int], dict[str, str]] | None = None  # of a rank that runs

    def environment_of(self, rank: int) -> dict[str, str]:
        """What a rank's process alone has."""
        compiles = {"RANK_ID": str(rank), "RANK_SIZE": str(self.world_size)}
        return self.own_environment(rank) if self.own_environment else compiles


class RankPool:
    """The process of rank_server.py: it imports everything once and compiles ranks, `workers` at a time.

    All RankJobs that one pool is given have the same module, level and environment. Ctrl-C stops the children too.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.process: subprocess.Popen | None = None
        self.submitted = 0
        self.ended: dict[str, dict] = {}  # by folder

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        if self.process is not None:
            if failure[0] is not None or len(self.ended) < self.submitted:
                self.process.kill()
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()

    def submit(self, jobs: RankJobs, ranks: list[int]) -> None:
        """Let the pool compile `ranks` after what it was given before. Raises StandInError."""
        if ranks and self.process is None:
            self.process, self.server_folder = _start_server(jobs, ranks[0]), jobs.out.resolve()
            told = {"module": jobs.module, "workers": self.workers, "timeout_seconds": jobs.timeout_seconds}
            self._tell(told | {"arguments": jobs.arguments(_folder(jobs, ranks[0]))})
        for rank in ranks:
            folder = _folder(jobs, rank)
            folder.mkdir(parents=True, exist_ok=True)
            told = {"environment": jobs.environment_of(rank), "folder": str(folder)}
            self._tell(told | {"arguments": jobs.arguments(folder)})
            self.submitted += 1

    def _tell(self, line: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; `results` says so for every rank
            self.process.stdin.write(json.dumps(line).encode() + b"\n")
            self.process.stdin.flush()

    def results(self, jobs: RankJobs, ranks: list[int]) -> Iterator[RankResult]:
        """What becomes of ranks that were submitted to be compiled, as they end."""
        for rank, folder, code, seconds in self.ends(jobs, ranks):
            yield _read_result(jobs, folder, rank, code, seconds)

    def ends(self, jobs: RankJobs, ranks: list[int]) -> Iterator[tuple[int, Path, int | None, float]]:
        """(rank, folder of its log, exit code, seconds) as ranks end; the code is None when one took too long."""
        waiting = {str(_folder(jobs, rank)): rank for rank in ranks}
        while waiting:
            for folder in [folder for folder in waiting if folder in self.ended]:
                ended = self.ended[folder]
                yield waiting.pop(folder), Path(folder), ended["code"], ended["seconds"]
            line = self.process.stdout.readline() if waiting else None
            if line:
                ended = json.loads(line)
                self.ended[ended["folder"]] = ended
            elif line is not None:  # the server itself has ended
                code = self.process.wait()
                for rank in waiting.values():
                    yield rank, self.server_folder, code, 0.0
                return


def compile_ranks(jobs: RankJobs, ranks: list[int], workers: int) -> list[RankResult]:
    """Compile `ranks`, `workers` at a time, with a progress bar; results in the order of `ranks`.

    Raises StandInError when the stand-in libraries cannot be built.
    """
    results: dict[int, RankResult] = {}
    with RankPool(workers) as pool:
        pool.submit(jobs, ranks)
        for result in tqdm(pool.results(jobs, ranks), total=len(ranks), desc="compiling ranks", unit="rank"):
            results[result.rank] = result
            tqdm.write(_one_line(result), file=sys.stderr)
    return [results[rank] for rank in ranks]


def _folder(jobs: RankJobs, rank: int) -> Path:
    return jobs.out.resolve() / f"rank_{rank}"


def _one_line(result: RankResult) -> str:
    """What became of a rank, for those who watch."""
    peak = result.memory.get("actual_peak_bytes")
    memory = f", planned peak {peak / 2**30:.1f} GiB" if peak else ""
    return f"rank {result.rank} (stage {result.stage}) {result.status} after {result.seconds:.0f} s{memory}"


def _start_server(jobs: RankJobs, rank: int) -> subprocess.Popen:
    """The process from which the ranks are forked; it and they end with this one. Its log is in `jobs.out`."""
    env = dict(os.environ) if jobs.level is None else ascend_environment(rank, jobs.world_size, jobs.level)
    env["PYTHONPATH"] = ":".join((*jobs.python_path, env.get("PYTHONPATH", "")))
    env.setdefault("GLOG_v", "3")
    jobs.out.mkdir(parents=True, exist_ok=True)
    with (jobs.out / LOG).open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", rank_server.__name__],
            env=env | jobs.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=rank_server.end_with_parent,
        )


def _read_result(jobs: RankJobs, folder: Path, rank: int, code: int | None, seconds: float) -> RankResult:
    """What a child left in `folder`; `code` is its exit code, None when it took too long."""
    log = folder / LOG
    text = log.read_text(errors="replace")
    result = RankResult(rank, rank // jobs.devices_per_stage, COMPILED, seconds, str(log))
    result.compiler_errors = list(dict.fromkeys(COMPILER_ERROR.findall(text)))
    if code == 0 and (folder / "compiled.json").exists():
        result.compiled = json.loads((folder / "compiled.json").read_text())
        result.memory = {k: int(m[1]) * 2**20 for k, p in MEMORY_LINES.items() if (m := p.search(text))}
    elif (folder / "failure.json").exists():
        failure = json.loads((folder / "failure.json").read_text())
        first_line = next(iter(failure["message"].strip().splitlines()), "")
        result.status, result.message = REFUSED, f"{failure['exception']}: {first_line}"
        result.source_lines = failure["source_lines"]
        if failure["exception"] == "MemoryError" or "bad_alloc" in failure["message"]:
            result.status, result.message = KILLED, f"{result.message}{OUT_OF_MEMORY}"
    elif code is None:
        result.status, result.message = TIMED_OUT, f"no result after {jobs.timeout_seconds:.0f} s"
    elif code < 0:
        name = signal.Signals(-code).name
        hint = OUT_OF_MEMORY if name == "SIGKILL" else ""
        result.status, result.message = KILLED, f"the compiler process was ended by {name}{hint}"
    else:
        last = "\n".join(text.splitlines()[-LAST_LOG_LINES:])
        result.status, result.message = KILLED, f"the compiler process ended with code {code}:\n{last}"
    return result
