"""The routed experts of this device on buffers as long as the rows that chose them, which is known at run time, or as
long as a bound.

Extends `mindformers/parallel_core/training_graph/transformer/moe/token_dispatcher.py` (1.9.0), which sorts ids and pads
a token for each expert. Ascend's graph has values whose length the device tells (NonZero, AlltoAllV); where memory is
planned, which needs lengths, `assume_balanced` gives them those of experts that all have as many rows. On CPU
(lowering/bounded_rows.py) a buffer is as long as it can ever be; what lies behind the real rows must reach nobody.

Legend: N tokens, H hidden, F expert width, K experts per token, L experts of this device, R their rows.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import GroupedMatmul, IndexAddExt, IndexSelect, NonZero, Swiglu

# Attribute of an operator whose result's length is known at run time: of its input's elements at most this part,
# (numerator, denominator).
AT_MOST = "at_most"


class TakeRows(nn.Cell):
    """x[index]: (R, H) <- x (N, H), index (R,), or (R,) <- (N,); the gradient adds what comes back."""

    def __init__(self):
        super().__init__()
        self.take, self.add, self.zeros_like = IndexSelect(), IndexAddExt(), ops.ZerosLike()

    def construct(self, x, index):
        return self.take(x, 0, index)

    def bprop(self, x, index, out, dout):
        return self.add(self.zeros_like(x), 0, index, dout), self.zeros_like(index)


class AddRows(nn.Cell):
    """The transpose of TakeRows: y (R, H) summed into the rows `index` of zeros in the shape of x (N, H)."""

    def __init__(self):
        super().__init__()
        self.take, self.add, self.zeros_like = IndexSelect(), IndexAddExt(), ops.ZerosLike()

    def construct(self, x, index, y):
        return self.add(self.zeros_like(x), 0, index, y)

    def bprop(self, x, index, y, out, dout):
        return self.zeros_like(x), self.zeros_like(index), self.take(dout, 0, index)


class WeighRows(nn.Cell):
    """y (R, F) times weight (R, 1); the gradient of a weight is a sum over its row, which MindSpore would derive."""

    def __init__(self):
        super().__init__()
        self.sum = ops.ReduceSum(keep_dims=True)

    def construct(self, y, weight):
        return y * weight

    def bprop(self, y, weight, out, dout):
        return dout * weight, self.sum(dout * y, -1)


class GroupedExperts(nn.Cell):
    """SwiGLU of each row's own expert: (R, H) <- x (R, H) sorted by expert, ends (L,) int64, weights as below.

    `weight` (R, 1), if there is one, weighs a row's result: before the second product, which is linear and widens, so
    that its result need not be kept for the weight's gradient. The last end is R: every row is written.
    """

    def __init__(self):
        super().__init__()
        self.gate_up_mul, self.down_mul = GroupedMatmul(3, 0), GroupedMatmul(3, 0)
        self.swiglu, self.weigh = Swiglu(), WeighRows()

    def construct(self, x, ends, gate_up, down, weight=None):
        y = self.gate_up_mul([x], [gate_up], None, None, None, None, None, ends)[0]
        y = self.swiglu(y, -1)
        if weight is not None:
            y = self.weigh(y, weight)
        return self.down_mul([y], [down], None, None, None, None, None, ends)[0]


class ExactExperts(nn.Cell):
    """(N, H) <- x (N, H), gates (N, K) float32, ids (N, K), gate_up (L, H, 2F), down (L, F, H).

    A choice whose id lies outside 0..L-1 belongs to another device and counts nothing. Rows come sorted by expert from
    a table that says for each expert and token which choice it is. Gates weigh the narrow values before the second
    product (GroupedExperts).
    """

    def __init__(self, config, local_experts: int):
        super().__init__()
        self.local_experts, self.topk = local_experts, config.moe_config.num_experts_chosen
        self.devices = config.moe_config.expert_num // local_experts
        bounded = config.moe_config.dropless_rows == "bounded"
        self.factor, self.balanced = config.moe_config.dropless_row_factor if bounded else 0.0, False
        self.find = NonZero().add_prim_attr(AT_MOST, (min(self.topk, local_experts), local_experts))
        self.take_number, self.take_gate, self.take_token = IndexSelect(), TakeRows(), TakeRows()
        self.grouped, self.add = GroupedExperts(), AddRows()
        self.experts = Tensor(np.arange(local_experts, dtype=np.int32).reshape(1, -1, 1))
        self.is_last = Tensor(np.arange(local_experts) == local_experts - 1, mstype.int64)

    def assume_balanced(self) -> None:
        """Give every buffer the length that it has when all experts of the model have as many rows."""
        self.balanced = True

    def construct(self, x, gates, ids, gate_up, down):
        choice, ends = self._rows_of(ops.stop_gradient(ids))
        return self._mix(x, gates, choice, ends, gate_up, down)

    def mix_bounded(self, x, gates, ids, gate_up, down):
        """What `construct` returns, of the rows up to the bound; how many choices of each token came later (N,)."""
        choices = ids.shape[0] * self.topk
        table, ends = self._table(ops.stop_gradient(ids))
        rows = min(math.ceil(self.factor * choices / self.devices), table.shape[0])
        is_choice = ops.logical_and(table > 0, table <= choices)
        chosen = ops.cast(is_choice, mstype.float32)
        row = ops.cast(ops.cumsum(chosen, 0), mstype.int32) - 1
        held = ops.logical_and(is_choice, row < rows)
        # Rows that nobody fills are the last expert's, on the choice whose gate is 0: no row is left as it was.
        table = ops.concat((table, ops.full((1,), choices + 1, dtype=mstype.int32)))
        place = ops.full((rows + 1,), table.shape[0] - 1, dtype=mstype.int32)
        row = ops.select(held, row, ops.full_like(row, rows))
        place = ops.tensor_scatter_elements(place, row, ops.cast(ops.arange(row.shape[0]), mstype.int32), 0)[:rows]
        ends = ops.maximum(ops.minimum(ends, rows), self.is_last * rows)
        y = self._mix(x, gates, self.take_number(table, 0, place) - 1, ends, gate_up, down)
        dropped = (chosen - ops.cast(held, mstype.float32)).reshape((self.local_experts, -1)).sum(0)
        return y, dropped

    def _mix(self, x, gates, choice, ends, gate_up, down):
        """Run the experts on the rows of these choices (R,), sorted by expert, which end at `ends` (L,)."""
        tokens = x.shape[0]
        token = ops.minimum(choice // self.topk, tokens - 1)
        gates = ops.concat((gates.reshape((-1,)), ops.zeros((1,), gates.dtype)))
        weight = ops.cast(self.take_gate(gates, choice), x.dtype).reshape((-1, 1))
        return self.add(
            ops.stop_gradient(x), token, self.grouped(self.take_token(x, token), ends, gate_up, down, weight)
        )

    def _table(self, ids):
        """(L*N,) int32: 1 + number of the choice that token made of an expert, or 0; where its rows end (L,) int64.

        Operators on no row at all are not documented: where nobody chose an expert of this device, the last one has the
        choice after the last, whose gate is 0.
        """
        tokens = ids.shape[0]
        number = ops.arange(1, tokens * self.topk + 1).reshape((tokens, self.topk))
        number = ops.cast(number, mstype.int32).transpose((1, 0)).expand_dims(1)  # (K, 1, N)
        mine = ids.transpose((1, 0)).expand_dims(1) == self.experts  # (K, L, N)
        table = ops.select(mine, ops.broadcast_to(number, mine.shape), ops.zeros(mine.shape, mstype.int32)).sum(0)
        table = ops.cast(table, mstype.int32)
        ends = ops.cumsum(ops.cast(table > 0, mstype.float32).sum(1), 0)
        table = table.reshape((-1,))
        last = table[-1:]
        last = ops.select(ends[-1:] > 0, last, ops.full_like(last, tokens * self.topk + 1))
        return ops.concat((table[:-1], last)), ops.maximum(ops.cast(ends, mstype.int64), self.is_last)

    def _rows_of(self, ids):
        """All choices of this device's experts (R,), sorted by expert, then token, and where each expert's end (L,)."""
        table, ends = self._table(ids)
        if self.balanced:
            place = ops.arange(max(ids.shape[0] * self.topk // self.devices, 1))
        else:
            place = self.find(table).reshape((-1,))
        return self.take_number(table, 0, place) - 1, ends
