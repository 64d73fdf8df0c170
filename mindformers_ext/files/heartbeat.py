"""Where every rank of a run is, for whoever watches it: one small file a rank, written before and after each step."""

import os
import shutil
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mindformers_ext.files.atomic import write_json
from mindformers_ext.files.json_files import convert, read_object

FOLDER = "heartbeat"  # of output_dir


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life."""

    rank: int
    host: str
    pid: int
    born: int  # when the process began, by which it is told from a later one of its number
    step: int  # begun last
    in_step: bool  # False: it has ended, and callbacks or data follow
    compiling: bool  # in the first step of the process, which may take any time
    time: float  # seconds since 1970

    @classmethod
    def of_this_process(cls, rank: int, step: int, in_step: bool, compiling: bool) -> "Beat":
        """The beat of now."""
        born = state_of(os.getpid())[1]
        return cls(rank, socket.gethostname(), os.getpid(), born, step, in_step, compiling, time.time())

    @property
    def is_here(self) -> bool:
        """True while the process runs on this machine."""
        return self.host == socket.gethostname() and state_of(self.pid)[1] == self.born

    def __str__(self) -> str:
        where = f"{'in' if self.in_step else 'after'} step {self.step}"
        return f"rank {self.rank} (process {self.pid} on {self.host}), {where},"


def write(output_dir: Path, beat: Beat) -> None:
    """Replace a rank's file."""
    write_json(output_dir / FOLDER / f"rank_{beat.rank}.json", asdict(beat))


def read(output_dir: Path) -> list[Beat]:
    """The last beat of every rank that has begun a step."""
    beats = []
    for path in sorted((output_dir / FOLDER).glob("rank_*.json")):
        try:
            beats.append(convert(read_object(path), Beat, path))
        except (OSError, ValueError):  # it is being replaced, or its rank ends
            continue
    return beats


def clear(output_dir: Path) -> None:
    """Forget the ranks of the run before."""
    shutil.rmtree(output_dir / FOLDER, ignore_errors=True)


def end(output_dir: Path, rank: int) -> None:
    """Nobody need watch this rank any more."""
    (output_dir / FOLDER / f"rank_{rank}.json").unlink(missing_ok=True)


def hung(beats: list[Beat], seconds: float) -> Beat | None:
    """The rank that holds the others up when one gave no sign for so long, None when all live.

    The others wait for it inside the step; it is the one that did not come so far, or a process that is stopped.
    """
    if not beats or any(b.compiling for b in beats) or time.time() - min(b.time for b in beats) < seconds:
        return None
    return min(beats, key=lambda beat: (not is_stopped(beat), beat.step, not beat.in_step, beat.time))


def show_stack(beat: Beat) -> None:
    """Let a rank of this machine print its stacks (training/heartbeat.py), also one that was stopped."""
    if not beat.is_here:
        return
    for number in (signal.SIGUSR2, signal.SIGCONT):
        os.kill(beat.pid, number)
    time.sleep(1)


def is_stopped(beat: Beat) -> bool:
    """True for a process of this machine that somebody has stopped, or that waits for a disk."""
    return beat.is_here and state_of(beat.pid)[0] in "TtD"


def state_of(pid: int) -> tuple[str, int]:
    """State and birth of a process as Linux tells them (proc_pid_stat(5), fields 3 and 22); ("", 0) without it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])
