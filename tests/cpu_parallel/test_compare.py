"""What the comparison of ranks with the single process measures, and what it leaves out."""

import numpy as np

from mindformers_ext.cpu_parallel.compare import is_certain, relative


def test_relative_difference():
    reference = np.array([1.0, -4.0, 0.0])
    assert relative(reference + [0, 0, 0.4], reference) == 0.1
    assert relative(reference + [np.nan, 0, 0], reference) == float("inf")
    assert relative(reference + [0, 0, 0.4], reference, np.array([True, True, False])) == 0


def test_gradients_that_rounding_left_are_no_evidence():
    moment = np.array([2.0, 0.0, 1.9e-5, 2.1e-5, -1e-9])
    assert is_certain(moment).tolist() == [True, True, False, True, False]
    assert is_certain(np.zeros(3)).all()  # nothing was learnt: everything is compared
