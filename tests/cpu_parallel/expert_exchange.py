"""A dispatch of dropless experts and its gradients on several ranks, with a routing that the batch gives."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
from helpers.small_models import v3_config
from mindspore import Tensor, nn, ops
from mindspore.communication import get_group_size, get_rank

from mindformers_ext.layers.moe_dispatch import expert_dispatch

TOKENS, HIDDEN, EXPERTS, TOPK, WIDTH = 12, 8, 8, 3, 6  # tokens: of one rank


class Weighted(nn.Cell):
    """A number that every output of a dispatch counts in with its own weight."""

    def __init__(self, dispatch):
        super().__init__()
        self.dispatch = dispatch

    def construct(self, x, gates, ids, gate_up, down, weights):
        y = self.dispatch.run(x, gates, ids, gate_up, down)
        return (ops.cast(y, ms.float32) * weights).sum()


class Dropped(nn.Cell):
    """Choices of a rank's tokens that found no row."""

    def __init__(self, dispatch):
        super().__init__()
        self.dispatch, self.counts = dispatch, hasattr(dispatch, "run_and_count")

    def construct(self, x, gates, ids, gate_up, down):
        if not self.counts:
            return ops.zeros((), ms.float32)
        return self.dispatch.run_and_count(x, gates, ids, gate_up, down)[1].sum()


class Exchange(nn.Cell):
    """The global batch -> what rank-free code can compute too: numbers of this rank's part, see `digest`."""

    def __init__(self, dispatch, dtype):
        super().__init__()
        self.optimizer = SimpleNamespace(parameters=[])  # the rank compiler asks what is trained
        self.loss, self.grad, self.dtype = Weighted(dispatch), ops.GradOperation(get_all=True), dtype
        self.dropped = Dropped(dispatch)
        self.first, self.first_expert = get_rank() * TOKENS, get_rank() * EXPERTS // get_group_size()
        self.experts = EXPERTS // get_group_size()

    def construct(self, x, gates, ids, gate_up, down, weights):
        first, last = self.first, self.first + TOKENS
        gate_up = ops.cast(gate_up[self.first_expert : self.first_expert + self.experts], self.dtype)
        down = ops.cast(down[self.first_expert : self.first_expert + self.experts], self.dtype)
        x = ops.cast(x[first:last], self.dtype)
        inputs = x, gates[first:last], ids[first:last], gate_up, down, weights[first:last]
        gradients = self.grad(self.loss)(*inputs)
        dx, dgates, dgate_up, ddown = gradients[0], gradients[1], gradients[3], gradients[4]
        numbers = self.loss(*inputs), digest(dx), digest(dgates), digest(dgate_up), digest(ddown)
        return (*numbers, self.dropped(*inputs[:5]))


def digest(x):
    """A sum in which every element has a weight of its own."""
    x = ops.cast(x, ms.float32).reshape((-1,))
    return (x * ops.cos(ops.cast(ops.arange(x.shape[0]), ms.float32))).sum()


def build(dtype: str = "float32", **moe):
    """Builder for the rank compiler."""
    ms.set_auto_parallel_context(parallel_mode="stand_alone")
    moe = dict(expert_num=EXPERTS, num_experts_chosen=TOPK, moe_intermediate_size=WIDTH, n_group=1, topk_group=1) | moe
    config = v3_config(hidden_size=HIDDEN, moe=moe | dict(use_fused_ops_permute=True))
    group = SimpleNamespace(size=get_group_size(), rank=get_rank(), inner=1, name="hccl_world_group")
    return Exchange(expert_dispatch(config, group), getattr(ms, dtype)), tuple(map(Tensor, batch()))


def batch(ids=None, ranks: int = 2):
    """x, gates, ids, gate_up, down of all ranks, and the weights of the outputs."""
    rng = np.random.default_rng(3)
    tokens = TOKENS * ranks
    if ids is None:
        ids = np.stack([rng.permutation(EXPERTS)[:TOPK] for _ in range(tokens)])
    gate_up, down = rng.normal(0, 0.4, (EXPERTS, HIDDEN, 2 * WIDTH)), rng.normal(0, 0.4, (EXPERTS, WIDTH, HIDDEN))
    x, gates = rng.normal(size=(tokens, HIDDEN)), rng.uniform(0.1, 1, (tokens, TOPK))
    floats = (a.astype(np.float32) for a in (gate_up, down, rng.normal(size=x.shape)))
    return x.astype(np.float32), gates.astype(np.float32), ids.astype(np.int32), *floats
