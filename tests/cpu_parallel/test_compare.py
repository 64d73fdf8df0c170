"""What the comparison of ranks with the single process measures, and what it leaves out."""

import json
from pathlib import Path

import numpy as np
import pytest

from mindformers_ext.cpu_parallel.compare import Comparison, compare, relative
from mindformers_ext.training.certain_elements import CertainElements, is_certain

RATE, BETA1, BETA2, EPS = 2e-3, 0.9, 0.95, 1e-8


def test_relative_difference():
    reference = np.array([1.0, -4.0, 0.0])
    assert relative(reference + [0, 0, 0.4], reference) == 0.1
    assert relative(reference + [np.nan, 0, 0], reference) == float("inf")
    assert relative(reference + [0, 0, 0.4], reference, np.array([True, True, False])) == 0


def test_gradients_that_rounding_left_are_no_evidence():
    moment = np.array([2.0, 0.0, 1.9e-5, 2.1e-5, -1e-9])
    assert is_certain(moment).tolist() == [True, True, False, True, False]
    assert is_certain(np.zeros(3)).all()  # nothing was learnt: everything is compared


class Training:
    """AdamW on one weight (4,) in float64, and what a process of verify_parallel.py writes about it."""

    def __init__(self, gradients: np.ndarray):
        self.weight = np.linspace(1.0, 4.0, 4)
        self.certain = CertainElements()
        first = second = np.zeros(4)
        for step, gradient in enumerate(gradients, 1):
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient**2
            scale = np.sqrt(second / (1 - BETA2**step)) + EPS
            self.weight = self.weight - RATE * first / (1 - BETA1**step) / scale
            self.certain.note({"exp_avg.w": first})
            if step == 1:
                self.moments = first
        self.first = first

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        np.savez(folder / "moments.npz", **{"exp_avg.w": self.moments})
        np.savez(folder / "final.npz", **{"w": self.weight, "exp_avg.w": self.first})
        self.certain.save(folder / "certain.npz")
        (folder / "result.json").write_text(json.dumps({"outputs": [[1.0]]}))
        (folder / "compiled.json").write_text(json.dumps({"layouts": {}}))


def compared(tmp_path: Path, single: np.ndarray, rank: np.ndarray) -> Comparison:
    """What a rank with gradients (steps, 4) of its own differs by from the single process."""
    Training(single).write(tmp_path / "single")
    Training(rank).write(tmp_path / "ranks" / "rank_0")
    return compare(tmp_path / "single", tmp_path / "ranks", 1)


GRADIENTS = np.array([[4.7e-3, 1e-3, -2e-3, 0.0], [4e-3, 1e-3, 2e-3, 1e-3], [3e-3, -1e-3, 2e-3, 1e-3]])


@pytest.mark.parametrize("step", range(3))
def test_an_element_that_one_step_moved_by_rounding_is_no_evidence(tmp_path, step):
    single, rank = GRADIENTS.copy(), GRADIENTS.copy()
    single[: step + 1, 1] = rank[: step + 1, 1] = 0.0
    single[step, 1], rank[step, 1] = 6.6e-9, -6.6e-9  # of 4.7e-3: the sign is chance, AdamW steps by it all the same
    assert abs(Training(single).weight[1] - Training(rank).weight[1]) > 1e-4 * 4.0
    assert compared(tmp_path, single, rank).passed


@pytest.mark.parametrize("step", range(3))
def test_a_wrong_gradient_of_one_step_is_found(tmp_path, step):
    rank = GRADIENTS.copy()
    rank[step, 1] *= -1.0
    found = compared(tmp_path, GRADIENTS, rank)
    assert not found.passed
    assert found.parameter.value > 1e-4


def test_a_gradient_where_the_single_process_has_none_is_found(tmp_path):
    rank = GRADIENTS.copy()
    rank[0, 3] = 6.6e-9
    assert not compared(tmp_path, GRADIENTS, rank).passed
