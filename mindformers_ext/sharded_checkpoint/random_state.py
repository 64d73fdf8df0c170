"""The random generators of this process as plain JSON, so that a resumed run draws what comes next.

Python's, numpy's and MindSpore's default generator. Kernels that keep a generator of their own (MindSpore's Dropout in
a CPU graph) start again from the seed.
"""

import random
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor


def random_state() -> dict[str, Any]:
    """The state of every generator."""
    kind, keys, *rest = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "numpy": [kind, keys.tolist(), *rest],
        "python": [version, list(numbers), gauss],
        "mindspore": ms.get_rng_state().asnumpy().tolist(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator to a state that random_state returned."""
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    ms.set_rng_state(Tensor(np.array(state["mindspore"], np.uint8)))
