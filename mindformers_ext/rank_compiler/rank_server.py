"""Compile ranks in forked children of one process that has imported everything before: importing MindSpore and
MindFormers costs each rank as much as compiling three layers.

    python -m mindformers_ext.rank_compiler.rank_server   (started by rank_pool.py in `ascend_environment`)

Reads one JSON object: `module`, whose `main(arguments) -> exit code` compiles a rank and whose `preload(arguments)`
imports what it needs; `workers`, `timeout_seconds`; and `ranks`, each {rank, folder, arguments}. Prints a JSON line
{rank, code, seconds} for each rank that has ended, code null when it took too long. What a rank prints goes to log.txt
in its folder.
"""

import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from mindformers_ext.child_process import end_with_parent


@dataclass
class Child:
    """A rank that is being compiled; `handle` becomes readable when it ends."""

    rank: int
    pid: int
    handle: int
    start: float


def serve(request: dict, answer: Callable[[dict], None]) -> None:
    """Compile all ranks of `request`, `workers` at a time; `answer` gets each one's end."""
    module, limit = importlib.import_module(request["module"]), request["timeout_seconds"]
    module.preload(request["ranks"][0]["arguments"])
    gc.freeze()  # children share what is there; a collection would write into all of it
    waiting, children = list(reversed(request["ranks"])), []
    while waiting or children:
        while waiting and len(children) < request["workers"]:
            children.append(start(module, waiting.pop()))
        patience = max(min(child.start for child in children) + limit - time.time(), 0)
        ended = select.select([child.handle for child in children], [], [], patience)[0]
        for child in list(children):
            seconds = time.time() - child.start
            timed_out = child.handle not in ended and seconds >= limit
            if timed_out:
                os.killpg(child.pid, signal.SIGKILL)
            if timed_out or child.handle in ended:
                children.remove(child)
                os.close(child.handle)
                code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
                answer({"rank": child.rank, "code": None if timed_out else code, "seconds": seconds})


def start(module, job: dict) -> Child:
    """Fork a child that becomes the rank and compiles it.

    It leaves through the interpreter's own end, where MindSpore prints its memory plan.
    """
    pid = os.fork()
    if pid:
        return Child(job["rank"], pid, os.pidfd_open(pid), time.time())
    os.setpgid(0, 0)
    end_with_parent()
    log = os.open(os.path.join(job["folder"], "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["folder"])
    os.environ["RANK_ID"] = str(job["rank"])
    sys.exit(module.main(job["arguments"]))


def main() -> None:
    """Serve what the standard input asks for; the standard output carries answers only."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    serve(json.load(sys.stdin), lambda ended: print(json.dumps(ended), file=answers))


if __name__ == "__main__":
    main()
