"""Supervision of rank processes."""

import re
import signal
import subprocess
import sys

import pytest

from mindformers_ext.cpu_parallel import launch


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


def test_killed_rank_is_the_cause_even_when_others_report_first():
    killed = python("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(launch.RankError, match="rank 1 failed first: exit code -9"):
        launch.supervise([python("raise SystemExit(1)"), killed], explain)


def test_killed_rank_without_a_report(tmp_path):
    _, message = launch.failure_of(tmp_path / "failure.json", tmp_path / "run.log", 2, -9)
    assert message.startswith("killed by SIGKILL; its log is ")


def test_lines_are_handed_on_when_they_are_whole(tmp_path):
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    for log in logs:
        log.write_text("")
    said = []
    follower = launch.Follower(logs, re.compile("INFO - (step .*)"), said.append)
    with logs[1].open("a") as growing:
        growing.write("starting\nINFO - step 1, los")
        growing.flush()
        follower.read()
        assert said == []
        growing.write("s 2.0\n")
        growing.flush()
        follower.read()
    follower.read()
    assert said == ["step 1, loss 2.0"]
