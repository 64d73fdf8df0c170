"""small_deepseek with packed samples: each sequence has positions of its own, which begin anew with its documents."""

import numpy as np
from cpu_parallel import small_deepseek
from cpu_parallel.small_deepseek import BATCH, FUSED, SIZES
from mindspore import Tensor

from mindformers_ext.cpu_parallel.verify import Layout

LAYOUTS = [
    Layout("dp2-packed", {"parallel": {"data_parallel": 2}}, world_size=2),
    Layout("dp2-mp2-packed", {"parallel": {"data_parallel": 2, "model_parallel": 2}}, world_size=4),
    Layout("dp2-cp2-packed", {"parallel": {"data_parallel": 2, "context_parallel": 2}}, world_size=4),
]


def data(step: int) -> tuple[np.ndarray, ...]:
    """input_ids, labels (B, S) int32, loss_mask float32 and position_ids int32 of one step."""
    ids, labels = small_deepseek.data(step)
    starts = np.random.default_rng((5, step)).integers(1, SIZES["seq_length"], (BATCH, 1))
    place = np.arange(SIZES["seq_length"])
    positions = np.where(place < starts, place, place - starts).astype(np.int32)
    return ids, labels, (labels >= 0).astype(np.float32), positions


def build(parallel: dict):
    """Builder for the rank compiler, with Ascend's fused operators."""
    cell, _ = small_deepseek.build(parallel, **FUSED)
    return cell, tuple(Tensor(x) for x in data(0))


def build_single(steps: int = 5):
    """Builder for the single process."""
    cell, _ = small_deepseek.build_single(steps=0)
    return cell, [data(step) for step in range(steps)]
