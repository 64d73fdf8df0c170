"""A checkpoint is whole or not there: kills, crashes at every operation, replaced steps, slow and diverging ranks."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.layouts import Degrees, save, slots, values

from mindformers_ext.errors import TrainingStopped
from mindformers_ext.sharded_checkpoint import writer
from mindformers_ext.sharded_checkpoint.audit import verify_all
from mindformers_ext.sharded_checkpoint.layout import BLOCK_BYTES, Meta, Piece
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.sharded_checkpoint.writer import Saver, saved_steps, write_part

ROOT = Path(__file__).parents[2]


def piece(array) -> Piece:
    """A whole parameter."""
    array = np.asarray(array)
    return Piece(array, Slot.whole(array.shape))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def check_whole(root: Path) -> None:
    """`latest` and every step's folder are whole."""
    for source in [open_source(root), *(open_source(path) for path in saved_steps(root))]:
        verify_all(source)
        step = source.meta.step
        assert source.path.name == f"step_{step:06d}"
        assert int(source.read("w")[0]) == step  # the values of that step


def test_types_shapes_and_blocks_come_back(tmp_path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "scalar": np.float32(3.5),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
        "long": rng.integers(0, 9, (3, 4)),
        "bf16": rng.standard_normal((5, 6)).astype(ml_dtypes.bfloat16),
        "turned": rng.standard_normal((700, 2000)).astype(np.float32).T,  # not contiguous, more than a block
    }
    assert arrays["turned"].nbytes > BLOCK_BYTES
    Saver(tmp_path).save(Meta(1, 1), {name: piece(array) for name, array in arrays.items()})
    source = open_source(tmp_path)
    verify_all(source)
    for name, array in arrays.items():
        got = source.read(name)[...]
        assert got.dtype == np.asarray(array).dtype
        np.testing.assert_array_equal(got, array, err_msg=name)
    np.testing.assert_array_equal(source.read("turned")[1500:1600, 3:-1], arrays["turned"][1500:1600, 3:-1])


def test_the_newest_are_kept(tmp_path) -> None:
    saver = Saver(tmp_path, keep=2)
    for step in (5, 10, 15):
        saver.save(Meta(step, 1), {"w": piece([step])})
    assert names(tmp_path) == ["latest", "step_000010", "step_000015"]
    check_whole(tmp_path)
    saver.save(Meta(10, 1, prefix="again"), {"w": piece([10])})  # a run that went back
    assert open_source(tmp_path).meta.prefix == "again"
    assert names(tmp_path) == ["latest", "step_000010", "step_000015"]
    saver.save(Meta(12, 1), {"w": piece([12])})
    assert open_source(tmp_path).meta.step == 12
    check_whole(tmp_path)


def test_background_save_holds_the_values_of_its_step(tmp_path) -> None:
    saver = Saver(tmp_path, in_background=True)
    value = np.full(1_000_000, 1.0, np.float32)
    for step in (1, 2, 3):
        value[:] = step
        saver.save(Meta(step, 1), {"w": piece(value)})
        value[:] = -1
    saver.wait()
    check_whole(tmp_path)
    assert [int(open_source(path).read("w")[-1:][0]) for path in saved_steps(tmp_path)] == [1, 2, 3]


def test_background_failure_stops_the_next_save(tmp_path, monkeypatch) -> None:
    saver = Saver(tmp_path, in_background=True)
    saved = []
    saver.save(Meta(1, 1), {"w": piece([1])}, saved=lambda: saved.append(1))
    saver.wait()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    saver.save(Meta(2, 1), {"w": piece([2])}, saved=lambda: saved.append(2))
    with pytest.raises(TrainingStopped, match="cannot save step 2: No space left on device; make room"):
        saver.wait()
    assert saved == [1]
    monkeypatch.undo()
    check_whole(tmp_path)
    assert open_source(tmp_path).meta.step == 1


def test_a_rank_that_does_not_write_is_named(tmp_path) -> None:
    own = slots(Degrees(mp=2))[0]
    pieces = {name: Piece(np.zeros(slot.shape, np.float32), slot) for name, slot in own.items()}
    with pytest.raises(TrainingStopped, match="rank 1 of 2 has not written its part of step 9 after 0 s"):
        Saver(tmp_path, 0, 2, timeout=0.2).save(Meta(9, 2), pieces)
    assert not saved_steps(tmp_path) and not (tmp_path / "latest").exists()
    Saver(tmp_path, 0, 2).clear()
    assert names(tmp_path) == []


def test_ranks_that_diverged_are_not_saved(tmp_path) -> None:
    """Stages hold their own copy of the step counter; one that differs means that the ranks went apart."""
    stages = slots(Degrees(first_layers=(0, 2)))
    for rank, step in ((1, 8), (0, 7)):
        pieces = {name: Piece(values()[name], slot) for name, slot in stages[rank].items()}
        pieces["global_step"] = Piece(np.array([step], np.int32), stages[rank]["global_step"])
        saver = Saver(tmp_path, rank, 2)
        if rank:
            saver.save(Meta(7, 2), pieces)
    with pytest.raises(TrainingStopped, match="'global_step' .* differs between ranks 0 and 1; the ranks diverged"):
        saver.save(Meta(7, 2), pieces)
    assert not saved_steps(tmp_path)


def test_a_part_that_nobody_holds_is_named(tmp_path) -> None:
    with pytest.raises(TrainingStopped, match="no rank holds some elements of 1 parameters, the first is 'w'"):
        Saver(tmp_path).save(Meta(1, 1), {"w": Piece(np.zeros((2, 3)), Slot((4, 3), ((0, 2), (0, 3))))})


OPERATIONS = [(os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink")]


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("step,keep", [(4, 2), (3, 5), (2, 5)], ids=["next step", "latest again", "earlier again"])
def test_a_crash_at_any_operation_leaves_whole_checkpoints(tmp_path, monkeypatch, step: int, keep: int) -> None:
    """Die before each file operation of a save in turn, until it goes through."""
    for dies_at in itertools.count():
        root = tmp_path / str(dies_at)
        for earlier in (1, 2, 3):
            Saver(root).save(Meta(earlier, 1), {"w": piece([earlier])})
        remaining = itertools.count(dies_at, -1)

        def dying(original, remaining=remaining):
            def run(*args, **options):
                if next(remaining) <= 0:
                    raise Crash
                return original(*args, **options)

            return run

        with monkeypatch.context() as patch:
            for owner, name in OPERATIONS:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                Saver(root, keep=keep).save(Meta(step, 1), {"w": piece([step])})
                survived = True
            except Crash:
                survived = False
        check_whole(root)
        Saver(root).clear()
        check_whole(root)
        if survived:
            break
    assert dies_at > 8 and open_source(root).meta.step == step


WRITER = """
import sys
import numpy as np
from mindformers_ext.sharded_checkpoint.layout import Meta, Piece
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.sharded_checkpoint.writer import Saver
saver = Saver(sys.argv[1], keep=2, in_background=sys.argv[2] == "True")
saver.clear()
print("ready", flush=True)
for step in range(int(sys.argv[3]), 10**9):
    value = np.full(20_000, step, np.float32)
    saver.save(Meta(step, 1), {"w": Piece(value, Slot.whole(value.shape))})
    print(step, flush=True)
"""


@pytest.mark.parametrize("in_background", [False, True])
def test_kill_at_a_random_moment(tmp_path, in_background: bool) -> None:
    """SIGKILL while it saves step after step, 20 times in all; the next run goes on from what is there.

    Of saves in the background the last one may not have begun when it is told: the one before it is whole.
    """
    moments = random.Random(1)
    first = 1
    for _ in range(10):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(in_background), str(first)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(3 + moments.randrange(4)):  # "ready" and two steps at least
            process.stdout.readline()
        time.sleep(moments.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (tmp_path / "latest").exists():
            check_whole(tmp_path)
            first = open_source(tmp_path).meta.step + 1
    assert first > 10


def test_a_later_run_does_not_take_parts_of_a_killed_one(tmp_path) -> None:
    """Rank 1's part of step 7 was written by a run that died; the new run waits for the new part."""
    degrees = Degrees(mp=2)
    stale = {name: value + 1 for name, value in values().items()}
    own = slots(degrees)[1]
    pieces = {name: Piece(np.zeros(slot.shape, np.float32), slot) for name, slot in own.items()}
    write_part(tmp_path / ".partial_step_000007", 1, pieces, {})
    for rank in (0, 1):
        Saver(tmp_path, rank, 2).clear()
    save(tmp_path, degrees, parameters=stale)
    source = open_source(tmp_path)
    for name, value in stale.items():
        np.testing.assert_array_equal(source.read(name)[...], value)
