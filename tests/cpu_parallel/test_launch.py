"""Supervision of rank processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindformers_ext.cpu_parallel import launch
from mindformers_ext.rank_compiler.rank_pool import RankJobs, RankPool


def python(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code])


def explain(rank: int, code: int) -> tuple[float, str]:
    return (0.0 if code < 0 else 1.0), f"exit code {code}"


def test_all_fine():
    launch.supervise([python("pass"), python("pass")], explain)


def test_first_failure_ends_the_others(monkeypatch):
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    sleeper = python("import time; time.sleep(60)")
    with pytest.raises(launch.RankError, match="rank 1 failed first: exit code 3"):
        launch.supervise([sleeper, python("raise SystemExit(3)")], explain)
    assert sleeper.returncode == -signal.SIGKILL


RANK = """
import os, sys, threading, time
from pathlib import Path
from mindformers_ext.collectives import collectives
from mindformers_ext.cpu_parallel.run_rank import as_rank

def work():
    # What MindSpore leaves behind when a step fails: a thread that the interpreter's end waits for.
    threading.Thread(target=time.sleep, args=(60,)).start()
    Path(sys.argv[1], f"ready_{sys.argv[2]}").touch()
    while True:
        collectives.barrier([0, 1])
        time.sleep(0.01)

as_rank(sys.argv[3], int(sys.argv[2]), 2, Path(sys.argv[1], f"failure_{sys.argv[2]}.json"), work)
"""


def test_the_survivor_of_a_killed_rank_is_gone_within_two_seconds(tmp_path):
    job = f"killed-{os.getpid()}"
    environment = os.environ | {"PYTHONPATH": str(Path(launch.__file__).parents[2])}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank), job], env=environment)
        for rank in range(2)
    ]
    while len(list(tmp_path.glob("ready_*"))) < 2:
        assert [rank.poll() for rank in ranks] == [None, None]
        time.sleep(0.05)
    ranks[1].kill()
    killed = time.monotonic()
    with pytest.raises(launch.RankError, match="rank 1 failed first"):
        launch.supervise(ranks, explain)
    assert time.monotonic() - killed < 2
    assert ranks[0].returncode == 1  # by itself
    assert "has died" in (tmp_path / "failure_0.json").read_text()


def test_killed_rank_is_the_cause_even_when_others_report_first():
    killed = python("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(launch.RankError, match="rank 1 failed first: exit code -9"):
        launch.supervise([python("raise SystemExit(1)"), killed], explain)


def test_killed_rank_without_a_report(tmp_path):
    _, message = launch.failure_of(tmp_path / "failure.json", tmp_path / "run.log", 2, -9)
    assert message.startswith("killed by SIGKILL; its log is ")


def test_lines_are_handed_on_once_and_when_they_are_whole(tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for log in logs:
        log.write_text("")
    said = []
    follower = launch.Follower(logs, re.compile("^says (.*)"), said.append)
    with logs[1].open("a") as growing:
        growing.write("starting\nsays step 1, los")
        growing.flush()
        follower.read()
        assert said == []
        growing.write("s 2.0\n")
        growing.flush()
        follower.read()
    logs[0].write_text("says step 1, loss 2.0\n")
    follower.read()
    assert said == ["step 1, loss 2.0"]


def test_a_forked_run_names_the_rank_that_failed_first(tmp_path):
    """By its own sentence where it wrote one, by its log otherwise; a rank that does not end is one of them."""

    def jobs(code: str, seconds: float = 60.0) -> RankJobs:
        where = {"out": tmp_path, "level": None, "python_path": (str(Path(__file__).parents[1]),)}
        own = {"own_environment": lambda rank: {"R": str(rank)}, "timeout_seconds": seconds}
        return RankJobs("helpers.rank_code", lambda _: [code], 2, 2, **where, **own)

    def failure(code: str, seconds: float = 60.0) -> str:
        with RankPool(2) as pool, pytest.raises(launch.RankError) as raised:
            launch.run_forked(pool, jobs(code, seconds))
        return str(raised.value)

    with RankPool(2) as pool:
        launch.run_forked(pool, jobs("import os; open('rank', 'w').write(os.environ['R'])"))
    assert [(tmp_path / f"rank_{rank}" / "rank").read_text() for rank in range(2)] == ["0", "1"]
    told = "import json, os, sys; r = int(os.environ['R']); "
    told += (
        "json.dump({'rank': r, 'message': f'rank {r}: broke', 'time': 9 - r}, open('failure.json', 'w')); sys.exit(1)"
    )
    assert failure(told) == "rank 1 failed first: broke"
    said = "import os, sys; print('error: no data'); sys.exit(2 * int(os.environ['R']))"
    assert failure(said).startswith("rank 1 failed first: exit code 2; its log is ")
    assert failure(said).endswith("log.txt; error: no data")
    hangs = "import os, time; time.sleep(60 * int(os.environ['R']))"
    assert "rank 1 failed first: no end after " in failure(hangs, 5.0)
