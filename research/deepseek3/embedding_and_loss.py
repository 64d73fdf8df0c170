"""Where the model meets its vocabulary: the rows of its first table, the cross entropy of its last.

Legend as in deepseek2_model.py.
"""

from linear import weight
from mindspore import dtype as mstype
from mindspore import nn, ops
from sharding import embedding_plan, is_sharded, losses_plan, run_locally, shard, vocabulary_group

from mindformers_ext.layers.fused_ops import GatherRows, activation_type
from mindformers_ext.layers.vocabulary import CrossEntropy, LookUp

__all__ = ["Embedding", "MeanLoss"]


class Embedding(nn.Cell):
    """Rows of a (V, H) table.

    Without a pipeline the operator is one that the compiler splits: where gradients are accumulated, MindSpore tells
    the end of a micro-batch by the gradient of the first operator that has a weight, and knows none of a local program.
    """

    def __init__(self, config):
        super().__init__()
        self.weight = weight(config, config.vocab_size, config.hidden_size)
        self.out_type = activation_type(config)
        if is_sharded() and config.parallel_config.pipeline_stage == 1:
            self.look_up = GatherRows(self.out_type)
            return shard(self.look_up, "embedding", config)
        group = vocabulary_group(config, not config.parallel_config.vocab_emb_dp)
        self.rows = LookUp(group, self.out_type, config.parallel_config.use_seq_parallel)
        self.look_up = run_locally(self.rows, self._shape, self._type, embedding_plan(config), config)

    def construct(self, ids):
        """(T, H) <- ids (T,)."""
        return self.look_up(self.weight, ids)

    def _shape(self, table, ids):
        return [ids[0], table[1]]

    def _type(self, table, ids):
        return self.out_type


class MeanLoss(nn.Cell):
    """Mean cross entropy of logits, each device's columns of the vocabulary where it has them."""

    def __init__(self, config):
        super().__init__()
        self.cross_entropy = CrossEntropy(vocabulary_group(config))
        self.losses = run_locally(self._losses, self._shape, self._type, losses_plan(), config)
        self.weigh, self.total = ops.Mul(), ops.ReduceSum()
        shard(self, "mean_loss", config)

    def construct(self, logits, labels, loss_mask):
        """(1,) float32 <- logits (T, V), labels (T,), loss_mask (T,)."""
        losses = self.total(self.weigh(self.losses(logits, labels), loss_mask))
        return (losses / (self.total(loss_mask) + 1e-8)).reshape((1,))

    def _losses(self, logits, labels):
        return self.cross_entropy(logits, labels)[0]

    def _shape(self, logits, labels):
        return labels

    def _type(self, logits, labels):
        return mstype.float32
