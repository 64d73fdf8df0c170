"""The simulated pipeline against textbooks and against itself without shortcuts."""

import random

import pytest

from mindformers_ext.dryrun import pipeline
from mindformers_ext.dryrun.pipeline import BACKWARD, FORWARD, in_flight, passes, simulate


def even(stages: int, chunks: int) -> tuple[list, list]:
    """Forward and backward seconds of equal stages."""
    return [[1.0] * stages] * chunks, [[2.0] * stages] * chunks


@pytest.mark.parametrize(("stages", "chunks", "micro"), [(4, 1, 8), (8, 1, 64), (4, 2, 8), (8, 4, 64)])
def test_bubble_is_that_of_the_papers(stages, chunks, micro):
    """(p - 1) / (v m) of the working time: arXiv 2104.04473, section 2.2."""
    timeline = simulate("1f1b", *even(stages, chunks), micro)
    work = 3.0 * chunks * micro
    assert timeline.seconds == pytest.approx(work * (1 + (stages - 1) / (chunks * micro)))


def test_gpipe_takes_as_long_as_1f1b_and_keeps_every_micro_batch():
    assert simulate("gpipe", *even(4, 1), 8).seconds == simulate("1f1b", *even(4, 1), 8).seconds
    assert in_flight("gpipe", 4, 1, 8, 0) == ((8,),)
    assert [in_flight("1f1b", 4, 1, 8, s) for s in range(4)] == [((4 - s,),) for s in range(4)]


def test_every_pass_runs_once_and_a_backward_after_its_forward():
    for stage in range(4):
        order = passes("1f1b", 4, 3, 8, stage)
        assert sorted(order) == sorted((k, c, m) for k in (FORWARD, BACKWARD) for c in range(3) for m in range(8))
        for chunk, micro in [(0, 0), (1, 5), (2, 7)]:
            assert order.index((FORWARD, chunk, micro)) < order.index((BACKWARD, chunk, micro))


def test_interleaving_keeps_more():
    """Narayanan et al.: 1 + (p - 1) / (p v) times the activations of a stage, whose chunks are 1 / v of it."""
    (first,) = {sum(flight) for flight in in_flight("1f1b", 8, 2, 32, 0)}
    assert first == 8 * 2 + 8 - 1


@pytest.mark.parametrize(("stages", "chunks", "micro"), [(4, 1, 61), (8, 2, 96), (4, 4, 64)])
@pytest.mark.parametrize("send", [0.0, 0.2])
def test_long_steps_are_as_long_as_simulated_whole(monkeypatch, stages, chunks, micro, send):
    pick = random.Random(stages * chunks)
    forward = [[pick.uniform(1, 1.5) for _ in range(stages)] for _ in range(chunks)]
    backward = [[pick.uniform(2, 3) for _ in range(stages)] for _ in range(chunks)]
    short = simulate("1f1b", forward, backward, micro, send)
    monkeypatch.setattr(pipeline, "ROUNDS", 10**6)
    whole = simulate("1f1b", forward, backward, micro, send)
    assert short.ends == pytest.approx(whole.ends, rel=1e-3)
