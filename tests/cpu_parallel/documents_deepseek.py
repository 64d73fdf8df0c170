"""small_deepseek with multi-token prediction and samples of several documents, told by their ends (actual_seq_len)."""

import numpy as np
from cpu_parallel import packed_deepseek, small_deepseek
from cpu_parallel.small_deepseek import BATCH, FUSED, SIZES
from mindspore import Tensor, nn

from mindformers_ext.cpu_parallel.verify import Layout

MODEL = FUSED["model"] | {"mtp_depth": 1}
DEGREES = {
    "dp2": {"data_parallel": 2},
    "mp2": {"model_parallel": 2},
    "cp2": {"context_parallel": 2},
    "dp2-cp2": {"data_parallel": 2, "context_parallel": 2},
    "cp2-mp2": {"context_parallel": 2, "model_parallel": 2, "use_seq_parallel": True},
}
LAYOUTS = [
    Layout(f"{name}-documents", {"parallel": degrees}, world_size=int(np.prod([*degrees.values()])))
    for name, degrees in DEGREES.items()
]


class ByEnds(nn.Cell):
    """Inputs as packed_deepseek, and where documents end."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, ids, labels, loss_mask, positions, ends):
        return self.net(ids, labels, loss_mask, positions, actual_seq_len=ends)


def data(step: int) -> tuple[np.ndarray, ...]:
    """As packed_deepseek: documents of which the second begins somewhere; then where they end, (B, 3) int32."""
    ids, labels, loss_mask, positions = packed_deepseek.data(step)
    length = SIZES["seq_length"]
    begins = (positions == 0).argsort(1, kind="stable")[:, -1:]  # of the second document
    ends = np.concatenate((begins, np.full((BATCH, 2), length)), 1).astype(np.int32)
    return ids, labels, loss_mask, positions, ends


def build(parallel: dict):
    """Builder for the rank compiler, with Ascend's fused operators."""
    cell, _ = small_deepseek.build(parallel, MODEL, FUSED["moe"], inputs=ByEnds)
    return cell, tuple(Tensor(x) for x in data(0))


def build_single(steps: int = 5):
    """Builder for the single process."""
    cell, _ = small_deepseek.build_single(MODEL, steps=0, inputs=ByEnds)
    return cell, [data(step) for step in range(steps)]
