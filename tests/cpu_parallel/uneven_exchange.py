"""A cell of two ranks that exchange parts of different lengths, as user code writes it: AlltoAllV and AlltoAllVC."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.communication import get_rank

SENT = ([1, 2], [2, 1])  # by rank: elements to rank 0, to rank 1
MATRIX = [0, 3, 2, 1]  # row by row: what rank 0 sends, then rank 1
DIGITS = np.array([1, 10, 100, 1000], np.float32)  # a sum with these weights tells the order of the elements


class Exchange(nn.Cell):
    """x (3,), to which a rank adds 3 times its number -> what arrives here, one number for each of both operators."""

    def __init__(self):
        super().__init__()
        self.optimizer = SimpleNamespace(parameters=[])  # the rank compiler asks what is trained
        rank = get_rank()
        self.sent, self.received = SENT[rank], [counts[rank] for counts in SENT]
        self.by_lists, self.by_matrix = ops.AlltoAllV(), ops.AlltoAllVC()
        self.digits, self.own = Tensor(DIGITS), Tensor(3.0 * rank, ms.float32)

    def construct(self, x):
        x = x + self.own
        return self.number(self.by_lists(x, self.sent, self.received)), self.number(self.by_matrix(x, MATRIX))

    def number(self, received):
        return (received * self.digits[: received.shape[0]]).sum()


def build():
    """Builder for the rank compiler."""
    ms.set_auto_parallel_context(parallel_mode="stand_alone")
    return Exchange(), (Tensor(np.arange(1, 4, dtype=np.float32)),)
