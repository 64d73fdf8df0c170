"""A small sharded network for the dry-run tests: its layouts, bytes and call counts are computed by hand there."""

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, lazy_inline, nn, ops
from mindspore.communication import get_group_size, get_rank
from mindspore.nn.wrap.cell_wrapper import _TrainGradAccuStepCell, _VirtualDatasetCell

BATCH, HIDDEN, FFN, LAYERS = 16, 64, 256, 4


class Block(nn.Cell):
    """Column- then row-parallel MLP with a residual: one AllReduce forward (down), one backward (up)."""

    def __init__(self, dp: int, mp: int):
        super().__init__()
        self.up = Parameter(Tensor(np.ones((HIDDEN, FFN)), ms.float32))
        self.down = Parameter(Tensor(np.ones((FFN, HIDDEN)), ms.float32))
        self.up_matmul = ops.MatMul().shard(((dp, 1), (1, mp)))
        self.act = ops.ReLU().shard(((dp, mp),))
        self.down_matmul = ops.MatMul().shard(((dp, mp), (mp, 1)))
        self.add = ops.Add().shard(((dp, 1), (dp, 1)))

    def construct(self, x):
        return self.add(x, self.down_matmul(self.act(self.up_matmul(x, self.up)), self.down))


class Net(nn.Cell):
    @lazy_inline
    def __init__(self, dp: int, mp: int, pp: int):
        super().__init__()
        self.blocks = nn.CellList([Block(dp, mp) for i in range(LAYERS)])
        for i, block in enumerate(self.blocks):
            block.pipeline_stage = i * pp // LAYERS
        self.loss = ops.ReduceMean().shard(((dp, 1),))

    def construct(self, x):
        for block in self.blocks:
            x = block(x)
        return self.loss(x)


def build(dp: int, mp: int, pp: int, micro: int = 1, shard_optimizer: bool = False):
    """Training cell of `Net` and its input; devices = dp * mp * pp."""
    assert get_group_size() == dp * mp * pp
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=get_group_size(),
        global_rank=get_rank(),
        full_batch=True,
        pipeline_stages=pp,
        search_mode="sharding_propagation",
        gradients_mean=False,
        enable_parallel_optimizer=shard_optimizer,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0},
    )
    net = Net(dp, mp, pp)
    inner = nn.PipelineCell(net, micro) if pp > 1 else net
    optimizer = nn.AdamWeightDecay(net.trainable_params(), learning_rate=1e-3)
    step = _TrainGradAccuStepCell if pp > 1 else nn.TrainOneStepCell
    cell = step(_VirtualDatasetCell(inner), optimizer)
    cell.set_train()
    return cell, (Tensor(np.ones((BATCH, HIDDEN)), ms.float32),)


def build_refused():
    """A strategy that cuts 64 columns into 3 parts: the compiler must refuse it."""
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel", device_num=get_group_size(), global_rank=get_rank(), full_batch=True
    )
    net = Block(1, 3)
    cell = nn.TrainOneStepCell(net, nn.SGD(net.trainable_params()))
    return cell, (Tensor(np.ones((BATCH, HIDDEN)), ms.float32),)
