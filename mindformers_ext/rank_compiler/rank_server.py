"""Compile ranks in forked children of one process that has imported everything before: importing MindSpore and
MindFormers costs each rank as much as compiling three layers.

    python -m mindformers_ext.rank_compiler.rank_server   (started by rank_pool.py in `ascend_environment`)

Reads JSON lines: first `module`, whose `main(arguments) -> exit code` compiles a rank and whose `preload(arguments)`
imports what it needs, `workers` and `timeout_seconds`; then one for each rank, {environment, folder, arguments}, until
its input ends. Prints a JSON line {folder, code, seconds} for each rank that has ended, code null when it took too
long. What a rank prints goes to log.txt in its folder. The module may do other work: verify.py's runs are forked too.
"""

import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mindformers_ext.child_process import end_with_parent


@dataclass
class Child:
    """A rank that is being compiled; `handle` becomes readable when it ends."""

    folder: str
    pid: int
    handle: int
    start: float


class Lines:
    """The JSON lines that come through a pipe, as they come."""

    def __init__(self, handle: int):
        self.handle, self.open, self.rest = handle, True, b""
        self.waiting: deque[dict] = deque()

    def read(self) -> None:
        """Add the lines that have come to `waiting`; blocks until something has, or no more will."""
        more = os.read(self.handle, 1 << 16)
        self.open = bool(more)
        *lines, self.rest = (self.rest + more).split(b"\n")
        self.waiting += map(json.loads, lines)

    def first(self) -> dict:
        """The next line."""
        while not self.waiting:
            self.read()
        return self.waiting.popleft()


def serve(lines: Lines, answer: Callable[[dict], None]) -> None:
    """Compile ranks until no line comes; `answer` gets each one's end."""
    told, children = lines.first(), []
    module, limit = importlib.import_module(told["module"]), told["timeout_seconds"]
    module.preload(told["arguments"])
    gc.freeze()  # children share what is there; a collection would write into all of it
    while lines.open or lines.waiting or children:
        while lines.waiting and len(children) < told["workers"]:
            children.append(start(module, lines.waiting.popleft()))
        patience = max(min(child.start for child in children) + limit - time.time(), 0) if children else None
        sources = [child.handle for child in children] + ([lines.handle] if lines.open else [])
        ended = select.select(sources, [], [], patience)[0]
        if lines.handle in ended:
            lines.read()
        for child in list(children):
            seconds = time.time() - child.start
            timed_out = child.handle not in ended and seconds >= limit
            if timed_out:
                os.killpg(child.pid, signal.SIGKILL)
            if timed_out or child.handle in ended:
                children.remove(child)
                os.close(child.handle)
                code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
                answer({"folder": child.folder, "code": None if timed_out else code, "seconds": seconds})


def start(module, job: dict) -> Child:
    """Fork a child that becomes the rank and compiles it.

    It leaves through the interpreter's own end, where MindSpore prints its memory plan.
    """
    pid = os.fork()
    if pid:
        return Child(job["folder"], pid, os.pidfd_open(pid), time.time())
    os.setpgid(0, 0)
    end_with_parent()
    log = os.open(os.path.join(job["folder"], "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    sys.exit(module.main(job["arguments"]))


def main() -> None:
    """Serve what the standard input asks for; the standard output carries answers only."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    serve(Lines(0), lambda ended: print(json.dumps(ended), file=answers))


if __name__ == "__main__":
    main()
