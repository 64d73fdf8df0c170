"""A run that is told from outside to save or to end does so after its step, and goes on as if nothing had been."""

import signal
import time
from pathlib import Path

import pytest
from helpers.command_line import run_mindformer

from mindformers_ext.sharded_checkpoint.audit import differences
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.training import start, steering


def test_kill_switch_and_save_now(trained: Path, toy_folder: Path) -> None:
    output = toy_folder / "steered"
    options = ["--output_dir", "steered", "--runner_config.epochs", "2", "--use_graceful_exit", "True"]
    options += ["--callbacks.0.save_checkpoint_steps", "100"]
    output.mkdir()
    (output / "kill_switch").touch()
    result = run_mindformer(toy_folder, *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "the run ends after step 1: " in result.stdout + result.stderr
    assert (output / "checkpoint/latest").read_text() == "step_000001" and not (output / "kill_switch").exists()
    (output / "save_now").touch()
    go_on = ["--load_checkpoint", "steered/checkpoint", "--resume_training", "True"]
    result = run_mindformer(toy_folder, *options, *go_on)
    assert result.returncode == 0, result.stderr[-3000:]
    steps = {path.name for path in (output / "checkpoint").glob("step_*")}
    assert steps == {"step_000001", "step_000002", "step_000016"} and not (output / "save_now").exists()
    assert not list(differences(open_source(output / "checkpoint"), open_source(trained / "checkpoint")))


@pytest.fixture
def steer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> steering.Steering:
    monkeypatch.setattr(start, "signals", [])
    steer = steering.Steering(True, 2.0)
    steer.folder = tmp_path
    return steer


def test_who_asks(steer: steering.Steering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steer.asked() == (steering.NOTHING, "")
    (tmp_path / "save_now").touch()
    assert steer.asked()[0] == steering.SAVE
    (tmp_path / "kill_switch").touch()
    assert steer.asked() == (steering.STOP, f"{tmp_path / 'kill_switch'} is there")
    monkeypatch.setattr(start, "STARTED", time.monotonic() - 7201)
    assert steer.asked() == (steering.STOP, "max_train_hours 2.0 are over")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        start.listen()
        signal.raise_signal(signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert steer.asked() == (steering.STOP, "it got SIGUSR1")
