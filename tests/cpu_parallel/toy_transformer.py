"""A small transformer for the parallel runs: tensor, data, pipeline and optimizer parallelism, all on basic operators.

The same cell builds the sharded graph of a rank (semi-auto parallel, Ascend front end) and the single process on CPU.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, lazy_inline, nn, ops
from mindspore.nn.wrap.cell_wrapper import _TrainGradAccuStepCell, _VirtualDatasetCell

from mindformers_ext.cpu_parallel.verify import Layout


def layout(name: str, **degrees) -> Layout:
    """A named layout of the toy."""
    sizes = [degrees.get(axis, 1) for axis in ("dp", "mp", "pp")]
    loss_stage = 0 if degrees.get("scheduler") == "zero_bubble_v" else sizes[2] - 1
    return Layout(name, degrees, int(np.prod(sizes)), sizes[2], degrees.get("micro", 1), loss_stage)


LAYOUTS = [
    layout("mp2", mp=2),
    layout("dp2-mp2-optimizer", dp=2, mp=2, shard_optimizer=True),
    layout("pp2", pp=2, micro=2),
    layout("dp2", dp=2),
    layout("dp4-optimizer", dp=4, shard_optimizer=True),
    layout("dp4-optimizer2", dp=4, shard_optimizer=True, shard_size=2),
    layout("mp4", mp=4),
    layout("pp2-mp2-optimizer", pp=2, micro=4, mp=2, shard_optimizer=True),
    layout("pp2-dp2-optimizer", pp=2, micro=4, dp=2, shard_optimizer=True),
    layout("pp2-dp2-mp2", pp=2, dp=2, mp=2, micro=2),
    layout("pp2-chunks2", pp=2, micro=4, chunks=2),
    *(
        layout(f"pp2-{name}", pp=2, micro=4, chunks=2, scheduler=name)
        for name in ("gpipe", "seqpipe", "seqsmartvpp", "zero_bubble_v")
    ),
]

BATCH, SEQUENCE, HIDDEN, HEADS, FFN, VOCAB, LAYERS = 8, 16, 32, 4, 64, 48, 2


@dataclass(frozen=True)
class Degrees:
    """Degrees of the toy; `micro` micro-batches per step when pp > 1."""

    dp: int = 1
    mp: int = 1
    pp: int = 1
    micro: int = 1
    shard_optimizer: bool = False
    chunks: int = 1  # 2: embedding and blocks lie on stages 0, 1, 0, and the loss on 1
    scheduler: str = "1f1b"
    shard_size: int = -1  # ranks that share one weight under optimizer parallelism; -1: all that have it


def parameter(rng, *shape: int, ones: bool = False) -> Parameter:
    value = np.ones(shape) if ones else rng.standard_normal(shape) * 0.1
    return Parameter(Tensor(value, ms.float32))


class Norm(nn.Cell):
    def __init__(self, rng, dp: int):
        super().__init__()
        self.gamma = parameter(rng, HIDDEN, ones=True)
        self.beta = parameter(rng, HIDDEN)
        self.norm = ops.LayerNorm(-1, -1, 1e-5).shard(((dp, 1), (1,), (1,)))

    def construct(self, x):
        return self.norm(x, self.gamma, self.beta)[0]


class Block(nn.Cell):
    """x (T, H) -> (T, H): attention with heads on mp, then a feed-forward layer with its width on mp."""

    def __init__(self, rng, layout: Degrees):
        super().__init__()
        dp, mp = layout.dp, layout.mp
        self.query, self.key, self.value = (parameter(rng, HIDDEN, HIDDEN) for _ in range(3))
        self.out, self.up, self.down = (parameter(rng, *s) for s in ((HIDDEN, HIDDEN), (HIDDEN, FFN), (FFN, HIDDEN)))
        self.norm1, self.norm2 = Norm(rng, dp), Norm(rng, dp)
        self.columns = ops.MatMul().shard(((dp, 1), (1, mp)))
        self.rows = ops.MatMul().shard(((dp, mp), (mp, 1)))
        self.scores = ops.BatchMatMul(transpose_b=True).shard(((dp, mp, 1, 1), (dp, mp, 1, 1)))
        self.weigh = ops.BatchMatMul().shard(((dp, mp, 1, 1), (dp, mp, 1, 1)))
        self.softmax = ops.Softmax(-1).shard(((dp, mp, 1, 1),))
        self.to_heads = ops.Transpose().shard(((dp, 1, mp, 1),))
        self.from_heads = ops.Transpose().shard(((dp, mp, 1, 1),))
        self.gelu = ops.GeLU().shard(((dp, mp),))
        self.add = ops.Add().shard(((dp, 1), (dp, 1)))
        self.add_mask = ops.Add().shard(((dp, mp, 1, 1), (1, 1)))
        self.scale = ops.Mul().shard(((dp, mp, 1, 1), ()))
        self.factor = Tensor((HIDDEN // HEADS) ** -0.5, ms.float32)
        self.mask = Tensor(np.triu(np.full((SEQUENCE, SEQUENCE), -1e4), 1), ms.float32)
        self.reshape = ops.Reshape()

    def heads(self, x, weight):
        shape = (x.shape[0] // SEQUENCE, SEQUENCE, HEADS, HIDDEN // HEADS)
        return self.to_heads(self.reshape(self.columns(x, weight), shape), (0, 2, 1, 3))

    def construct(self, x):
        h = self.norm1(x)
        q, k, v = self.heads(h, self.query), self.heads(h, self.key), self.heads(h, self.value)
        weights = self.softmax(self.add_mask(self.scale(self.scores(q, k), self.factor), self.mask))
        h = self.reshape(self.from_heads(self.weigh(weights, v), (0, 2, 1, 3)), (x.shape[0], HIDDEN))
        x = self.add(x, self.rows(h, self.out))
        return self.add(x, self.rows(self.gelu(self.columns(self.norm2(x), self.up)), self.down))


class Embedding(nn.Cell):
    """tokens (b, S) -> (T, H)."""

    def __init__(self, rng, dp: int):
        super().__init__()
        self.table = parameter(rng, VOCAB, HIDDEN)
        self.embed = ops.Gather().shard(((1, 1), (dp, 1)))
        self.reshape = ops.Reshape()

    def construct(self, tokens):
        return self.reshape(self.embed(self.table, tokens, 0), (-1, HIDDEN))


class Loss(nn.Cell):
    """x (T, H), labels (b, S) -> mean cross entropy."""

    def __init__(self, rng, dp: int):
        super().__init__()
        self.norm = Norm(rng, dp)
        self.head = parameter(rng, HIDDEN, VOCAB)
        self.logits = ops.MatMul().shard(((dp, 1), (1, 1)))
        self.log_softmax = ops.LogSoftmax(-1).shard(((dp, 1),))
        self.one_hot = ops.OneHot().shard(((dp, 1), (), ()))
        self.pick = ops.Mul().shard(((dp, 1), (dp, 1)))
        self.sum = ops.ReduceSum().shard(((dp, 1),))
        self.on, self.off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
        self.reshape, self.neg = ops.Reshape(), ops.Neg()

    def construct(self, x, labels):
        chances = self.log_softmax(self.logits(self.norm(x), self.head))
        picked = self.pick(chances, self.one_hot(self.reshape(labels, (-1,)), VOCAB, self.on, self.off))
        return self.neg(self.sum(picked)) / x.shape[0]


class Net(nn.Cell):
    """tokens, labels (b, S) int32 -> mean cross entropy."""

    def __init__(self, layout: Degrees):
        super().__init__()
        rng = np.random.default_rng(7)
        self.embedding = Embedding(rng, layout.dp)
        self.blocks = nn.CellList([Block(rng, layout) for _ in range(LAYERS)])
        self.loss = Loss(rng, layout.dp)
        self.embedding.pipeline_stage, self.loss.pipeline_stage = 0, layout.pp - 1
        for i, block in enumerate(self.blocks):
            block.pipeline_stage = (i * layout.pp // LAYERS + layout.chunks - 1) % layout.pp
        if layout.scheduler == "zero_bubble_v":
            self.blocks[1].pipeline_stage, self.loss.pipeline_stage = 1, 0
            for segment, cells in enumerate(((self.embedding, self.blocks[0]), (self.blocks[1], self.loss))):
                for cell in cells:
                    cell.pipeline_segment = segment

    def construct(self, tokens, labels):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.loss(x, labels)


class PipelineNet(Net):
    """The net as the pipeline scheduler needs it: one function that every micro-batch calls."""

    @lazy_inline
    def __init__(self, layout: Degrees):
        super().__init__(layout)


def data(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of one step: a pattern that can be learnt."""
    tokens = np.random.default_rng((11, step)).integers(0, VOCAB, (BATCH, SEQUENCE))
    return Tensor(tokens, ms.int32), Tensor((tokens * 5 + 1) % VOCAB, ms.int32)


def training_cell(layout: Degrees):
    """Forward, backward and AdamW of the toy under the parallel context that is set."""
    pipelined = layout.pp > 1
    net = (PipelineNet if pipelined else Net)(layout)
    matrices = [p for p in net.trainable_params() if p.ndim > 1]
    vectors = [p for p in net.trainable_params() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = nn.AdamWeightDecay(groups, learning_rate=1e-2)
    inner = nn.PipelineCell(net, layout.micro) if pipelined else net
    cell = (_TrainGradAccuStepCell if pipelined else nn.TrainOneStepCell)(_VirtualDatasetCell(inner), optimizer)
    cell.set_train()
    return cell


def build(**degrees):
    """Builder for the rank compiler: the training cell and its inputs."""
    layout = Degrees(**degrees)
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        full_batch=True,
        pipeline_stages=layout.pp,
        pipeline_config={"pipeline_interleave": layout.chunks > 1, "pipeline_scheduler": layout.scheduler},
        search_mode="sharding_propagation",
        gradients_mean=False,
        enable_parallel_optimizer=layout.shard_optimizer,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0, "optimizer_weight_shard_size": layout.shard_size},
    )
    return training_cell(layout), data(0)


def build_single(steps: int = 4):
    """Builder for the single process: the training cell and the numpy inputs of every step."""
    cell = training_cell(Degrees())
    return cell, [tuple(x.asnumpy() for x in data(step)) for step in range(steps)]
