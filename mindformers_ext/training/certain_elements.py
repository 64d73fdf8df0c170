"""Which elements of a training say something: those that no step moved by what rounding left of their gradient."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

# Below this part of its tensor's largest, a gradient is what rounding left of a sum of some thousand float32 terms
# that cancel. AdamW makes a step of any such number, in either direction, so these elements say nothing: it is enough
# that one step did so, since no later one takes it back.
ROUNDING = 1e-5


class CertainElements:
    """Judges every element by the running mean of its gradient after each step."""

    def __init__(self) -> None:
        self.so_far: dict[str, np.ndarray] = {}

    def note(self, moments: Mapping[str, np.ndarray]) -> None:
        """Take the optimizer's first moments after a step."""
        for name, moment in moments.items():
            self.so_far[name] = self.so_far.get(name, True) & is_certain(moment)

    def save(self, path: Path) -> None:
        np.savez(path, **self.so_far)


def is_certain(moment: np.ndarray) -> np.ndarray:
    """Where a gradient, by its running mean, is zero or more than rounding."""
    size = np.abs(moment)
    return (size == 0) | (size >= ROUNDING * size.max(initial=0.0))
