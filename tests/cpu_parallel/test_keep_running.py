"""The supervisor of a run: it goes on from the last checkpoint, gives up, and leaves out a step that kills twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import TOY

from mindformers_ext.config.data_check import read_loader
from mindformers_ext.config.run import read_run
from mindformers_ext.cpu_parallel import keep_running
from mindformers_ext.errors import TrainingStopped
from mindformers_ext.files import heartbeat
from mindformers_ext.sharded_checkpoint.layout import Meta, Piece, Slot
from mindformers_ext.sharded_checkpoint.writer import Saver

# In place of the project's: one step a line of the plan, which says where it dies; it notes what it was told.
FAKE = """
import json, os, sys, time
from pathlib import Path
from mindformers_ext.files import heartbeat
plan = json.loads(Path("plan.json").read_text())
code, step, begins = plan.pop(0)
Path("plan.json").write_text(json.dumps(plan))
with open("told.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if begins:
    heartbeat.write(Path("out"), heartbeat.Beat.of_this_process(0, step, True, False))
sys.exit(code)
"""


@pytest.fixture
def supervised(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`supervised(plan, restarts)`: what each start was told, for a plan of (exit code, step, begun)."""
    monkeypatch.chdir(tmp_path)
    for path in toy_folder.glob("toy_text_document.*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "run_mindformer.py").write_text(FAKE)

    def run(plan: list, restarts: int = 5) -> tuple[int, list[list[str]]]:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "run_mindformer.py", "--config", str(TOY / "train_toy.yaml"), "--output_dir", "out"]
        try:
            code = keep_running.keep_running(command, restarts, 1.0, 2, print)
        finally:
            told = [json.loads(line)[4:] for line in (tmp_path / "told.jsonl").read_text().splitlines()]
        return code, told

    return run


BOUND = ["--max_step_minutes", "30"]


def test_a_step_that_kills_twice_is_left_out(supervised, tmp_path: Path) -> None:
    Saver(tmp_path / "out/checkpoint").save(
        Meta(2, 1, consumed_samples=8), {"w": Piece(np.zeros(1, np.float32), Slot.whole((1,)))}
    )
    code, told = supervised([(-9, 5, True), (1, 4, True), (3, 5, True), (0, 9, True)])
    resume = ["--load_checkpoint", "out/checkpoint", "--resume_training", "True", "--ignore_data_skip", "False"]
    left_out = ["--train_dataset.data_loader.leave_out", "[[16, 20]]"]  # of step 5, after 2 steps of 4 samples
    assert code == 0
    assert told == [[*resume, *BOUND]] * 3 + [[*resume, *left_out, *BOUND]]
    state = json.loads((tmp_path / "out/keep_running.json").read_text())
    assert state["leave_out"] == [[16, 20]] and len(state["restarts"]) == 3


def test_it_starts_from_nothing_and_gives_up(supervised) -> None:
    """A run that dies before its first step has no step to leave out."""
    with pytest.raises(TrainingStopped, match="died 3 times in 1 hours, at last with exit code 1"):
        supervised([(1, 0, False)] * 3, restarts=2)
    code, told = supervised([(2, 0, False)])  # a YAML that is wrong is not tried again
    assert code == 2 and told == [BOUND] * 4


def test_a_launcher_takes_the_command_as_one_word(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bash", "scripts/msrun_launcher.sh", "run_mindformer.py --config 'a b.yaml'", "8"]
    assert keep_running.words_of(command) == ["--config", "a b.yaml"]
    longer = keep_running.with_options(command, ["--x", "[[1, 2]]"])
    assert longer == [*command[:2], "run_mindformer.py --config 'a b.yaml' --x '[[1, 2]]'", "8"]
    monkeypatch.chdir(toy_folder)
    run = read_run(TOY / "train_toy.yaml")
    assert read_loader(run, "train_dataset").count() == 32
    assert keep_running.samples_of(run, keep_running.State(leave_out=[[0, 2]]), 1) == [[2, 6]]


def test_the_rank_that_holds_the_others_up() -> None:
    now = time.time()

    def beats(*facts: tuple[int, bool, float]) -> list[heartbeat.Beat]:
        made = enumerate(facts)
        return [heartbeat.Beat(i, "other", 1, 0, step, inside, False, now - age) for i, (step, inside, age) in made]

    assert heartbeat.hung(beats((7, True, 50), (7, True, 50)), 60) is None
    assert heartbeat.hung([], 60) is None
    assert heartbeat.hung(beats((7, True, 70), (6, False, 69), (7, True, 71)), 60).rank == 1
    assert heartbeat.hung(beats((7, True, 70), (7, True, 69), (7, True, 71)), 60).rank == 2
    compiling = [heartbeat.Beat(0, "other", 1, 0, 1, True, True, now - 700)]
    assert heartbeat.hung(compiling, 60) is None
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, stopped.pid, os.WSTOPPED)
        born = heartbeat.state_of(stopped.pid)[1]
        sleeping = heartbeat.Beat(3, socket.gethostname(), stopped.pid, born, 7, True, False, now - 61)
        assert heartbeat.hung([*beats((7, True, 70), (6, False, 69)), sleeping], 60).rank == 3
        assert not replace(sleeping, born=born + 1).is_here  # another process of the same number
        stopped.kill()
