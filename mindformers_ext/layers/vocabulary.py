"""The two ends of a model, where the vocabulary may be split over devices: rows of its table, and the loss.

Takes the place of mindformers.core.loss.CrossEntropyLoss (1.9.0), which adds zero to the logits to have them split,
and writes one-hot labels and four more tensors as large as the logits. Both cells are per-device programs with the
collectives of their group (sharding.py, run_locally).

Legend: T tokens of this device, H hidden, V' rows of the vocabulary on this device.
"""

from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.communication import create_group

from mindformers_ext.layers.fused_ops import AddAt, table_rows


class VocabularyGroup:
    """The consecutive ranks that hold the parts of a vocabulary, in its order.

    Args:
        size: parts.
        rank: this device's global rank.
    """

    def __init__(self, size: int = 1, rank: int = 0):
        self.size, self.index = size, rank % size
        if size > 1:
            ranks = [rank - self.index + i for i in range(size)]
            self.name = "vocabulary-" + "-".join(map(str, ranks))
            create_group(self.name, ranks)


class VocabularyPart(nn.Cell):
    """What the two cells have in common."""

    def __init__(self, group: VocabularyGroup):
        super().__init__()
        self.parts, self.index = group.size, group.index

    def place(self, ids, rows: int):
        """Which of this device's `rows` each token names, (T,), and whether it names one of them, (T,) bool."""
        local = ids - self.index * rows
        return ops.minimum(ops.maximum(local, 0), rows - 1), ops.logical_and(local >= 0, local < rows)


class LookUp(VocabularyPart):
    """Rows of a table: (T, H) in `out_type` <- weight (V', H), ids (T,) int32.

    Where the table is split, each device gives the rows that it has. With `scatter` a device gets the sum for its own
    part of the tokens, (T / parts, H), else for all.
    """

    def __init__(self, group: VocabularyGroup, out_type, scatter: bool):
        super().__init__(group)
        self.out_type, self.rows = out_type, table_rows()
        if self.parts > 1:
            collective = ops.ReduceScatter if scatter else ops.AllReduce
            self.add_parts = collective(ops.ReduceOp.SUM, group.name)

    def construct(self, weight, ids):
        if self.parts == 1:
            return ops.cast(self.rows(weight, ids), self.out_type)
        place, own = self.place(ids, weight.shape[0])
        rows = ops.cast(self.rows(weight, place), self.out_type)
        return self.add_parts(rows * ops.cast(own, self.out_type).expand_dims(-1))


class CrossEntropy(VocabularyPart):
    """-log softmax(logits)[label] of each token, (T,) float32 <- logits (T, V'), labels (T,) int32.

    Its other results, (T, 1) each, are log sum exp of all logits and of this device's own, from which the backward has
    the probabilities again: no tensor as large as the logits is kept besides them.
    """

    def __init__(self, group: VocabularyGroup):
        super().__init__(group)
        self.log_softmax, self.softmax = ops.LogSoftmax(-1), ops.Softmax(-1)
        self.pick, self.add_at = ops.GatherD(), AddAt()
        if self.parts > 1:
            self.highest_part = ops.AllReduce(ops.ReduceOp.MAX, group.name)
            self.add_parts = ops.AllReduce(ops.ReduceOp.SUM, group.name)

    def construct(self, logits, labels):
        place, own = self.place(labels.expand_dims(-1), logits.shape[1])
        picked = ops.cast(self.pick(logits, 1, place), mstype.float32)  # (T, 1)
        own_total = picked - self.pick(self.log_softmax(ops.cast(logits, mstype.float32)), 1, place)
        if self.parts == 1:
            return (own_total - picked).reshape((-1,)), own_total, own_total
        highest = self.highest_part(own_total)
        picked = (picked - highest) * ops.cast(own, mstype.float32)
        both = self.add_parts(ops.concat((ops.exp(own_total - highest), picked), -1))
        log_total = ops.log(both[:, :1])
        return (log_total - both[:, 1:]).reshape((-1,)), log_total + highest, own_total

    def bprop(self, logits, labels, out, dout):
        """p - 1 at the label, p elsewhere, times the gradient of the token's loss.

        Every device of the group computes the same losses and gets its share of their gradient, as MindSpore splits
        the gradient of a result that is repeated.
        """
        place, own = self.place(labels.expand_dims(-1), logits.shape[1])
        gradient = dout[0].expand_dims(-1) * self.parts  # (T, 1)
        logits_gradient = self.softmax(ops.cast(logits, mstype.float32)) * (gradient * ops.exp(out[2] - out[1]))
        logits_gradient = self.add_at(logits_gradient, place, -gradient * ops.cast(own, mstype.float32))
        return ops.cast(logits_gradient, logits.dtype), ops.zeros_like(labels)
