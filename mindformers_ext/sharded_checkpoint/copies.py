"""Copies of what the next step changes, made while the training waits for them: as fast as memory goes."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class Copies:
    """Copies arrays on all cores, into memory that is kept: fresh pages would cost more than the writing."""

    def __init__(self):
        self.kept: dict[str, np.ndarray] = {}

    def take(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays as they are now, good until the next call."""
        for name, array in arrays.items():
            kept = self.kept.get(name)
            if kept is None or (kept.shape, kept.dtype) != (array.shape, array.dtype):
                self.kept[name] = np.empty(array.shape, array.dtype)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: np.copyto(self.kept[name], arrays[name]), arrays))
        return {name: self.kept[name] for name in arrays}
