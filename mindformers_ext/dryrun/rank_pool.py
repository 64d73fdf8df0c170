"""Compile many ranks in child processes: one folder and one log a rank, a failure of one never stops the others."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from json import loads
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mindformers_ext.dryrun.stand_in_cann import ascend_environment, stand_in_home

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
        for table in ("strategies", "parameters", "layouts"):
            data["compiled"].pop(table, None)
        return data


@dataclass(frozen=True)
class RankJobs:
    """How the ranks of one cluster are compiled."""

    command: Callable[[Path], list[str]]  # arguments of `python` that write the results into a folder
    world_size: int
    devices_per_stage: int
    out: Path
    level: int
    timeout_seconds: float = 3600.0
    python_path: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)  # added to the children's


def compile_ranks(jobs: RankJobs, ranks: list[int], workers: int) -> list[RankResult]:
    """Compile `ranks`, `workers` at a time, with a progress bar; results in the order of `ranks`.

    Raises StandInError when the stand-in libraries cannot be built. Ctrl-C stops the children too.
    """
    stand_in_home()  # built once, before the children ask for it
    running: set[subprocess.Popen] = set()
    results: dict[int, RankResult] = {}
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(_compile_one, jobs, rank, running) for rank in ranks]
            for future in tqdm(
                as_completed(futures), total=len(ranks), desc="compiling ranks", unit="rank", disable=not ranks
            ):
                result = future.result()
                results[result.rank] = result
                tqdm.write(_one_line(result), file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                _kill(process)
            raise
    return [results[rank] for rank in ranks]


def _one_line(result: RankResult) -> str:
    """What became of a rank, for those who watch."""
    peak = result.memory.get("actual_peak_bytes")
    memory = f", planned peak {peak / 2**30:.1f} GiB" if peak else ""
    return f"rank {result.rank} (stage {result.stage}) {result.status} after {result.seconds:.0f} s{memory}"


def _compile_one(jobs: RankJobs, rank: int, running: set[subprocess.Popen]) -> RankResult:
    folder = jobs.out.resolve() / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    env = ascend_environment(rank, jobs.world_size, jobs.level)
    env["PYTHONPATH"] = ":".join((*jobs.python_path, env["PYTHONPATH"]))
    env.setdefault("GLOG_v", "3")
    env |= jobs.environment
    start = time.time()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *jobs.command(folder)],
            cwd=folder,
            env=env,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        running.add(process)
        timer = threading.Timer(jobs.timeout_seconds, _kill, [process])
        timer.start()
        code = process.wait()
        timer.cancel()
        running.discard(process)
    seconds = time.time() - start
    return _read_result(jobs, rank, code, seconds, folder)


def _read_result(jobs: RankJobs, rank: int, code: int, seconds: float, folder: Path) -> RankResult:
    log = folder / "log.txt"
    text = log.read_text(errors="replace")
    result = RankResult(rank, rank // jobs.devices_per_stage, COMPILED, seconds, str(log))
    result.compiler_errors = list(dict.fromkeys(COMPILER_ERROR.findall(text)))
    if code == 0 and (folder / "compiled.json").exists():
        result.compiled = loads((folder / "compiled.json").read_text())
        result.memory = {k: int(m[1]) * 2**20 for k, p in MEMORY_LINES.items() if (m := p.search(text))}
    elif (folder / "failure.json").exists():
        failure = loads((folder / "failure.json").read_text())
        first_line = next(iter(failure["message"].strip().splitlines()), "")
        result.status, result.message = REFUSED, f"{failure['exception']}: {first_line}"
        result.source_lines = failure["source_lines"]
        if failure["exception"] == "MemoryError" or "bad_alloc" in failure["message"]:
            result.status, result.message = KILLED, f"{result.message}{OUT_OF_MEMORY}"
    elif code < 0 and seconds >= jobs.timeout_seconds:
        result.status, result.message = TIMED_OUT, f"no result after {jobs.timeout_seconds:.0f} s"
    elif code < 0:
        name = signal.Signals(-code).name
        hint = OUT_OF_MEMORY if name == "SIGKILL" else ""
        result.status, result.message = KILLED, f"the compiler process was ended by {name}{hint}"
    else:
        last = "\n".join(text.splitlines()[-LAST_LOG_LINES:])
        result.status, result.message = KILLED, f"the compiler process ended with code {code}:\n{last}"
    return result


def _kill(process: subprocess.Popen) -> None:
    """End a child and whatever it started."""
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
