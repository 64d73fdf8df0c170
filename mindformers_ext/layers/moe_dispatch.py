"""Carry tokens to their experts and back, on the tokens one device holds.

Extends `mindformers/parallel_core/training_graph/transformer/moe/token_dispatcher.py` (1.9.0), whose dispatchers run on
Ascend only. The policies compute the same numbers where nothing is dropped: `CapacityDispatch` (a fixed number of rows
per expert, all-to-all), and with tokens sorted by expert and a grouped matmul `DroplessDispatch` (all-gather) and
`AllToAllDispatch`. Each is plain per-device code: with expert parallelism it contains the collectives of its group.

Legend: T tokens of this device, H hidden, F expert width, E experts, L = E / ep experts of this device,
K experts per token, C rows an expert accepts from one group of tokens.
"""

import math

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import create_group
from mindspore.ops.auto_generate import IndexSelect, MoeTokenPermute, SiLU

from mindformers_ext.layers.exact_experts import AT_MOST, ExactExperts, GroupedExperts
from mindformers_ext.layers.fused_ops import FusedPermute, owner_of, routed_experts


class ExpertGroup:
    """The devices that share one set of experts: `size` consecutive ranks of a pipeline stage.

    Args:
        size: expert_parallel.
        rank: this device's global rank.
        inner: consecutive ranks close to each other (the model-parallel group), for the two-hop all-to-all.
    """

    def __init__(self, size: int = 1, rank: int = 0, inner: int = 1):
        self.size, self.rank = size, rank % size
        first = rank - self.rank
        self.inner = inner if 1 < inner < size and size % inner == 0 else 1
        if size > 1:
            self.name = self._create([first + i for i in range(size)])
        if self.inner > 1:
            base = first + self.rank // self.inner * self.inner
            self.inner_name = self._create([base + i for i in range(self.inner)])
            self.outer_name = self._create([first + self.rank % self.inner + i for i in range(0, size, self.inner)])

    @staticmethod
    def _create(ranks: list[int]) -> str:
        name = "ep-" + "-".join(map(str, ranks))
        create_group(name, ranks)
        return name


class DroplessDispatch(nn.Cell):
    """Every token reaches all its experts (arXiv 2412.19437, section 2.1.2: no token is dropped).

    With expert parallelism each device gathers the tokens of its group, runs its own experts on the rows that chose
    them, and the group sums the parts. A token travels ep times, as often as in an all-to-all while ep <= K.
    """

    def __init__(self, config, group: ExpertGroup):
        super().__init__()
        moe = config.moe_config
        self.ep = group.size
        self.local_experts = moe.expert_num // self.ep
        self.first_expert = group.rank * self.local_experts
        chosen_rows = self.ep > 1 and moe.dropless_rows != "worst_case"
        self.experts = (ExactExperts if chosen_rows else routed_experts)(config, self.local_experts)
        self.bounded = self.ep > 1 and moe.dropless_rows == "bounded"
        if self.ep > 1:
            self.gather_tokens = ops.AllGather(group.name)
            self.gather_weights = ops.AllGather(group.name)
            self.gather_ids = ops.AllGather(group.name)
            self.sum_parts = ops.ReduceScatter(ops.ReduceOp.SUM, group.name)
            self.sum_dropped = ops.ReduceScatter(ops.ReduceOp.SUM, group.name)

    def run(self, x, topk_weights, topk_ids, gate_up, down):
        """Mix the experts' outputs.

        Args:
            x: tokens (T, H).
            topk_weights: gates (T, K), float32.
            topk_ids: experts (T, K), int32.
            gate_up: (L, H, 2F).
            down: (L, F, H).

        Returns:
            (T, H), dtype of x.
        """
        return self.run_and_count(x, topk_weights, topk_ids, gate_up, down)[0]

    def run_and_count(self, x, topk_weights, topk_ids, gate_up, down):
        """What `run` returns, and how many choices of each token were dropped (T, 1) float32: with a bound only."""
        tokens = x.shape[0]
        if self.ep > 1:
            x, topk_weights = self.gather_tokens(x), self.gather_weights(topk_weights)
            topk_ids = self.gather_ids(topk_ids)
        inputs = x, topk_weights, topk_ids - self.first_expert, gate_up, down
        if self.bounded:
            y, dropped = self.experts.mix_bounded(*inputs)
            return self.sum_parts(y), self.sum_dropped(dropped.expand_dims(1))
        y = self.experts(*inputs)
        return self.sum_parts(y) if self.ep > 1 else y, ops.zeros((tokens, 1), mstype.float32)


class SendRows(nn.Cell):
    """x (R, H) by AlltoAllV: `sent` (ep,) int64 rows go to each device of the group, `received` come; the gradient goes
    back. A tuple of counts is constant.

    Args:
        most: the most rows that can arrive, as a part of R (numerator, denominator).
    """

    def __init__(self, group: str, width: int, most: tuple[int, int]):
        super().__init__()
        self.width = width
        self.there = ops.AlltoAllV(group, width).add_prim_attr(AT_MOST, most)
        self.back = ops.AlltoAllV(group, width).add_prim_attr(AT_MOST, most[::-1])

    def construct(self, x, sent, received):
        return self.there(x.reshape((-1,)), sent, received).reshape((-1, self.width))

    def bprop(self, x, sent, received, out, dout):
        dx = self.back(dout.reshape((-1,)), received, sent).reshape(x.shape)
        return dx, ops.zeros_like(sent), ops.zeros_like(received)


class SortRows(nn.Cell):
    """Rows x (R, H) sorted by ids (R, 1), and where each went (R,); R is known at run time."""

    def __init__(self):
        super().__init__()
        self.sort, self.take = MoeTokenPermute(), IndexSelect()

    def construct(self, x, ids):
        rows, place = self.sort(x, ids, None, False)
        return rows.reshape((-1, x.shape[1])), place

    def bprop(self, x, ids, out, dout):
        return self.take(dout[0], 0, out[1]), ops.zeros_like(ids)


class UnsortRows(nn.Cell):
    """The inverse of SortRows: (R, H) as they were, from y (R, H), where each went and the ids."""

    def __init__(self):
        super().__init__()
        self.sort, self.take = MoeTokenPermute(), IndexSelect()

    def construct(self, y, place, ids):
        return self.take(y, 0, place)

    def bprop(self, y, place, ids, out, dout):
        rows, _ = self.sort(dout, ids, None, False)
        return rows.reshape((-1, dout.shape[1])), ops.zeros_like(place), ops.zeros_like(ids)


class AllToAllDispatch(nn.Cell):
    """As DroplessDispatch, but a token travels to the devices of its experts only, with real counts (AlltoAllV).

    The rows of T*K choices are sorted by expert, sent, and sorted again where they arrive. Every device sends itself
    the choices of one token more, with gate 0, because operators on no row at all are not documented.
    """

    def __init__(self, config, group: ExpertGroup):
        super().__init__()
        moe = config.moe_config
        self.ep, self.topk = group.size, moe.num_experts_chosen
        self.local_experts = moe.expert_num // self.ep
        self.own_last = (group.rank + 1) * self.local_experts - 1
        self.balanced = False
        most = (self.ep * min(self.topk, self.local_experts), self.topk)
        self.swap_counts = ops.AlltoAll(self.ep, 0, 0, group.name)
        self.send, self.send_ids = SendRows(group.name, config.hidden_size, most), SendRows(group.name, 1, most)
        self.send_back = SendRows(group.name, config.hidden_size, most[::-1])
        self.to_host = ops.MoveTo()
        self.by_expert, self.sort, self.unsort = FusedPermute(), SortRows(), UnsortRows()
        self.grouped = GroupedExperts()
        self.expert = Tensor([list(range(moe.expert_num))], mstype.int32)

    def assume_balanced(self) -> None:
        """Let every device send as many rows to each: where memory is planned, counts must be constants."""
        self.balanced = True

    def run(self, x, topk_weights, topk_ids, gate_up, down):
        """Mix the experts' outputs; arguments and result as `DroplessDispatch.run`."""
        tokens, choices = x.shape[0], (x.shape[0] + 1) * self.topk
        ids = ops.stop_gradient(topk_ids)
        x = ops.concat((x, ops.zeros((1, x.shape[1]), x.dtype)), 0)
        ids = ops.concat((ids, ops.full((1, self.topk), self.own_last, dtype=mstype.int32)), 0)
        gates = ops.concat((topk_weights, ops.zeros((1, self.topk), topk_weights.dtype)), 0)
        counts = ops.cast(ids.reshape((-1, 1)) == self.expert, mstype.float32).sum(0)  # (E,)
        arriving = self.swap_counts(counts.reshape((self.ep, -1)))  # (ep, L) rows of this device's experts, by sender
        ends = ops.cast(ops.cumsum(arriving.sum(0), 0), mstype.int64)
        sent = self._by_device(counts.reshape((self.ep, -1)), choices)
        received = self._by_device(arriving, choices)
        rows, place = self.by_expert.permute(x, ids, choices)
        expert = owner_of(ops.cast(ops.arange(choices), mstype.int32), ops.cast(ops.cumsum(counts, 0), mstype.int32))
        expert = ops.cast(expert, mstype.int32)
        local = expert - expert // self.local_experts * self.local_experts
        rows, local = self.send(rows, sent, received), self.send_ids(local, sent, received)
        rows, place_here = self.sort(rows, local)
        y = self.unsort(self.grouped(rows, ends, gate_up, down), place_here, local)
        y = self.send_back(y, received, sent).reshape((choices, x.shape[1]))
        return self.by_expert.unpermute(y, place, gates)[:tokens]

    def _by_device(self, counts, choices: int):
        """Rows for or from each device: (ep,) int64 in the host's memory <- (ep, L)."""
        if self.balanced:
            share = choices // self.ep
            return (choices - share * (self.ep - 1),) + (share,) * (self.ep - 1)
        return self.to_host(ops.cast(counts.sum(1), mstype.int64), "CPU", True)


class CapacityDispatch(nn.Cell):
    """Each expert takes at most C rows from every group of tokens; the rest of its rows are dropped.

    C = ceil(K * group * capacity_factor / E), at most the group. Overflow drops the lowest-ranked choices first, or
    with `enable_sdrop` the last tokens of the group first. Groups cross neither sequences nor devices, so what is
    dropped does not depend on the parallel layout; `strategy_rules.capacity_groups` refuses layouts where they would.
    """

    def __init__(self, config, group: ExpertGroup):
        super().__init__()
        moe = config.moe_config
        self.ep, self.topk, self.num_experts = group.size, moe.num_experts_chosen, moe.expert_num
        self.local_experts = moe.expert_num // self.ep
        self.group_tokens = moe.expert_group_size or config.seq_length
        self.capacity_factor, self.drops_by_sequence = moe.capacity_factor, moe.enable_sdrop
        self.gate_up_mul, self.down_mul = ops.BatchMatMul(), ops.BatchMatMul()
        self.halve = ops.Split(-1, 2)
        self.silu = SiLU()
        self.cumsum = ops.CumSum()
        self.one_hot = ops.OneHot()
        self.one, self.zero = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.inner = group.inner if moe.group_wise_a2a else 1
        if self.inner > 1:
            outer = self.ep // self.inner
            self.swap_inner = ops.AlltoAll(self.inner, 1, 1, group.inner_name)
            self.swap_outer = ops.AlltoAll(outer, 0, 0, group.outer_name)
        elif self.ep > 1:
            self.swap = ops.AlltoAll(self.ep, 0, 0, group.name)

    def capacity(self, group_tokens: int) -> int:
        """Rows an expert accepts from a group of tokens."""
        return min(math.ceil(self.topk * group_tokens * self.capacity_factor / self.num_experts), group_tokens)

    def run(self, x, topk_weights, topk_ids, gate_up, down):
        """Mix the experts' outputs; arguments and result as `DroplessDispatch.run`."""
        tokens, hidden = x.shape
        group = min(self.group_tokens, tokens)  # fewer tokens than a group: a short text, or a layout that is refused
        groups, capacity = tokens // group, self.capacity(group)
        slot, kept = self._slots(topk_ids, groups, group, capacity)  # (T*K,) in [0, groups*E*C]
        token = ops.arange(tokens * self.topk) // self.topk
        owner = ops.full((groups * self.num_experts * capacity + 1,), tokens, dtype=mstype.int32)
        owner = ops.tensor_scatter_elements(owner, slot, ops.cast(token, mstype.int32), 0)[:-1]
        padded = ops.concat((x, ops.zeros((1, hidden), x.dtype)), 0)  # an empty slot reads the zero row
        buffer = ops.gather(padded, owner, 0).reshape((groups, self.num_experts, capacity, hidden))
        y = self._experts(buffer, gate_up, down).reshape((-1, hidden))  # (groups*E*C, H)
        y = ops.concat((y, ops.zeros((1, hidden), y.dtype)), 0)  # a dropped choice reads the zero row
        y = ops.gather(y, slot, 0).reshape((tokens, self.topk, hidden))
        gates = topk_weights * kept.reshape((tokens, self.topk))
        return (y * ops.cast(gates, y.dtype).expand_dims(-1)).sum(1)

    def _slots(self, topk_ids, groups, group, capacity):
        """Row of the buffer for each choice, and 1.0 where it is kept; dropped choices share the last row."""
        choice = topk_ids.reshape((groups, group, self.topk))
        if not self.drops_by_sequence:  # all first choices before any second one
            choice = choice.transpose((0, 2, 1))
        hits = self.one_hot(choice.reshape((groups, -1)), self.num_experts, self.one, self.zero)  # (groups, K*g, E)
        position = ((self.cumsum(hits, 1) - hits) * hits).sum(-1)  # earlier rows of the same expert
        if not self.drops_by_sequence:
            position = position.reshape((groups, self.topk, group)).transpose((0, 2, 1))
        position = ops.cast(position.reshape((groups, group, self.topk)), mstype.int32)
        first = ops.arange(groups).reshape((groups, 1, 1)) * self.num_experts
        slot = (first + topk_ids.reshape((groups, group, self.topk))) * capacity + position
        kept = position < capacity
        dropped = ops.full_like(slot, groups * self.num_experts * capacity)
        slot = ops.cast(ops.select(kept, slot, dropped), mstype.int32)
        return slot.reshape((-1,)), ops.cast(kept, mstype.float32)

    def _experts(self, buffer, gate_up, down):
        """SwiGLU of every expert on its rows: (groups, E, C, H) -> the same."""
        groups, _, capacity, hidden = buffer.shape
        rows = buffer.transpose((1, 0, 2, 3)).reshape((self.ep, -1, hidden))  # rows for each device of the group
        rows = self._exchange(rows).reshape((self.ep, self.local_experts, -1, hidden))
        rows = rows.transpose((1, 0, 2, 3)).reshape((self.local_experts, -1, hidden))  # (L, ep*groups*C, H)
        gate, up = self.halve(self.gate_up_mul(rows, gate_up))
        rows = self.down_mul(self.silu(gate) * up, down)
        rows = rows.reshape((self.local_experts, self.ep, -1, hidden)).transpose((1, 0, 2, 3))
        rows = self._exchange(rows.reshape((self.ep, -1, hidden)))
        return rows.reshape((self.num_experts, groups, capacity, hidden)).transpose((1, 0, 2, 3))

    def _exchange(self, rows):
        """Send part i of (ep, R, H) to device i of the group, and return what the others sent, by sender."""
        if self.inner > 1:
            two_level = rows.reshape((self.ep // self.inner, self.inner) + rows.shape[1:])
            return self.swap_outer(self.swap_inner(two_level)).reshape(rows.shape)
        return self.swap(rows) if self.ep > 1 else rows


def expert_dispatch(config, group: ExpertGroup) -> nn.Cell:
    """The policy that `moe_config` asks for."""
    moe = config.moe_config
    if not moe.use_gmm:
        return CapacityDispatch(config, group)
    by_all_to_all = group.size > 1 and moe.moe_token_dispatcher_type == "alltoall"
    return (AllToAllDispatch if by_all_to_all else DroplessDispatch)(config, group)
