"""A run that is not alone: another one in its output_dir, or a cluster's variables in its environment."""

import os
import subprocess
import sys

import pytest
from helpers.command_line import run_mindformer

from mindformers_ext.collectives import rank_job
from mindformers_ext.errors import ConfigError
from mindformers_ext.files import run_lock
from mindformers_ext.training.start import PLACE_IN_A_CLUSTER, forget_other_processes

HOLD = "import sys, time; from mindformers_ext.files import run_lock; run_lock.hold(sys.argv[1]); print(1, flush=True)"


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD + "; time.sleep(300)", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "1\n"
        yield process
        process.kill()


def test_a_kill_leaves_no_lock_behind(tmp_path, holder):
    with pytest.raises(ConfigError, match=f"being written by another run .process {holder.pid} on "):
        run_lock.hold(tmp_path)
    holder.kill()
    holder.wait()
    assert os.waitstatus_to_exitcode(os.system(f"{sys.executable} -c '{HOLD}' {tmp_path} > {os.devnull}")) == 0


def test_the_second_run_into_a_folder_is_refused_and_ignores_a_cluster(toy_folder, tmp_path, holder, monkeypatch):
    monkeypatch.setenv("RANK_SIZE", "8")
    monkeypatch.setenv("RANK_ID", "3")
    result = run_mindformer(toy_folder, "--output_dir", str(tmp_path))
    assert result.returncode == 2, result.stderr[-2000:]
    first, *_, last = result.stderr.strip().splitlines()
    assert first.startswith("ignored in the environment") and first.endswith("RANK_ID=3, RANK_SIZE=8")
    assert last.startswith(f"error: output_dir {tmp_path} is being written by another run (process {holder.pid}")
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", PLACE_IN_A_CLUSTER.split())
def test_one_process_forgets_its_place_in_a_cluster(name, monkeypatch, capsys):
    monkeypatch.delenv("MS_SIMULATION_LEVEL", raising=False)
    monkeypatch.delenv(rank_job.FOLDER, raising=False)
    monkeypatch.setenv(name, "5")
    forget_other_processes(use_parallel=True)
    assert os.environ[name] == "5"
    forget_other_processes(use_parallel=False)
    assert name not in os.environ
    assert f"{name}=5" in capsys.readouterr().err
