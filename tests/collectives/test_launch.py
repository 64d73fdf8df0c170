"""Supervision of rank processes."""

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
