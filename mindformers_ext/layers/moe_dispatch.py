"""Carry tokens to their experts and back, on the tokens one device holds.

Extends `mindformers/parallel_core/training_graph/transformer/moe/token_dispatcher.py` (1.9.0), whose dispatchers run on
Ascend only. The policies compute the same numbers where nothing is dropped: `CapacityDispatch` (a fixed number of rows
per expert, all-to-all), and with tokens sorted by expert and a grouped matmul `DroplessDispatch` (all-gather) and
`AllToAllDispatch`. Each is plain per-device code: with expert parallelism it contains the collectives of its group.

Legend: T tokens of this device, H hidden, F expert width, E experts, L = E / ep experts of this device,
K experts per token, C rows an expert accepts from one group of tokens.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import create_group
from mindspore.ops.auto_generate import IndexSelect, MoeTokenPermute, NonZero, SiLU
from mindspore.ops.composite import zeros_like  # of tuples too

from mindformers_ext.layers.exact_experts import (
    AT_MOST,
    AddRows,
    ExactExperts,
    GroupedExperts,
    TakeRows,
    WeighRows,
)
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
        dx = self.back(dout.reshape((-1,)), received, sent).reshape((-1, self.width))
        return dx, zeros_like(sent), zeros_like(received)


class OfKnownShape(nn.Cell):
    """x of known shape; its gradient, which comes from values of unknown length, is told so."""

    def construct(self, x):
        return x

    def bprop(self, x, out, dout):
        return (dout.reshape(x.shape),)


class SortRows(nn.Cell):
    """Rows x (R, H) sorted by ids (R, 1), and where each went (R,); R is known at run time, `width` is H."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.sort, self.take = width, MoeTokenPermute(), IndexSelect()

    def construct(self, x, ids):
        rows, place = self.sort(x, ids, None, False)
        return rows.reshape((-1, self.width)), place

    def bprop(self, x, ids, out, dout):
        return self.take(dout[0], 0, out[1]), ops.zeros_like(ids)


class UnsortRows(nn.Cell):
    """The inverse of SortRows: (R, H) as they were, from y (R, H), where each went and the ids."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.sort, self.take = width, MoeTokenPermute(), IndexSelect()

    def construct(self, y, place, ids):
        return self.take(y, 0, place)

    def bprop(self, y, place, ids, out, dout):
        rows, _ = self.sort(dout, ids, None, False)
        return rows.reshape((-1, self.width)), ops.zeros_like(place), ops.zeros_like(ids)


class ExpertExchange(nn.Cell):
    """Rows to the devices of their experts and back, with real counts: (R, H) <- rows (R, H) sorted by device.

    `local` (R, 1) int32 is each row's expert on its device, `counts` how many rows each expert of the group gets, by
    device; each device must get some. Where memory is planned, counts must be constants: `assume_balanced`.

    Args:
        most: the most rows that can arrive, as a part of R (numerator, denominator).
    """

    def __init__(self, group: str, size: int, hidden: int, most: tuple[int, int]):
        super().__init__()
        self.size, self.balanced = size, False
        self.swap_counts = ops.AlltoAll(size, 0, 0, group)
        self.send, self.send_ids = SendRows(group, hidden, most), SendRows(group, 1, most)
        self.send_back = SendRows(group, hidden, most[::-1])
        self.sort, self.unsort, self.grouped = SortRows(hidden), UnsortRows(hidden), GroupedExperts()
        self.to_host = ops.MoveTo()

    def assume_balanced(self) -> None:
        self.balanced = True

    def construct(self, rows, local, counts, gate_up, down):
        counts = counts.reshape((self.size, -1))
        arriving = self.swap_counts(counts)  # (size, L) rows of this device's experts, by sender
        ends = ops.cast(ops.cumsum(arriving.sum(0), 0), mstype.int64)
        sent, received = self._by_device(counts, rows), self._by_device(arriving, rows)
        rows, local = self.send(rows, sent, received), self.send_ids(local, sent, received)
        rows, place = self.sort(rows, local)
        y = self.unsort(self.grouped(rows, ends, gate_up, down), place, local)
        return self.send_back(y, received, sent)

    def _by_device(self, counts, rows):
        """Rows for or from each device: (size,) int64 in the host's memory <- (size, L)."""
        if self.balanced:
            return equal_parts(rows.shape[0], self.size)
        return self.to_host(ops.cast(counts.sum(1), mstype.int64), "CPU", True)


def equal_parts(rows: int, size: int) -> tuple[int, ...]:
    """`rows` in so many parts; what does not divide is in the first."""
    share = rows // size
    return (rows - share * (size - 1),) + (share,) * (size - 1)


class AllToAllDispatch(nn.Cell):
    """As DroplessDispatch, but a token travels to the devices of its experts only (ExpertExchange).

    Every device sends itself the choices of one token more, with gate 0, because operators on no row at all are not
    documented.
    """

    def __init__(self, config, group: ExpertGroup):
        super().__init__()
        moe = config.moe_config
        self.topk, self.local_experts = moe.num_experts_chosen, moe.expert_num // group.size
        self.own_last = (group.rank + 1) * self.local_experts - 1
        most = (group.size * min(self.topk, self.local_experts), self.topk)
        self.exchange = ExpertExchange(group.name, group.size, config.hidden_size, most)
        self.by_expert, self.known = FusedPermute(), OfKnownShape()
        self.expert = Tensor([list(range(moe.expert_num))], mstype.int32)

    def run(self, x, topk_weights, topk_ids, gate_up, down):
        """Mix the experts' outputs; arguments and result as `DroplessDispatch.run`."""
        tokens, choices = x.shape[0], (x.shape[0] + 1) * self.topk
        ids = ops.stop_gradient(topk_ids)
        x = ops.concat((x, ops.zeros((1, x.shape[1]), x.dtype)), 0)
        ids = ops.concat((ids, ops.full((1, self.topk), self.own_last, dtype=mstype.int32)), 0)
        gates = ops.concat((topk_weights, ops.zeros((1, self.topk), topk_weights.dtype)), 0)
        counts = ops.cast(ids.reshape((-1, 1)) == self.expert, mstype.float32).sum(0)  # (E,)
        rows, place = self.by_expert.permute(x, ids, choices)
        expert = owner_of(ops.cast(ops.arange(choices), mstype.int32), ops.cast(ops.cumsum(counts, 0), mstype.int32))
        local = place_within(ops.cast(expert, mstype.int32), self.local_experts).reshape((-1, 1))
        y = self.exchange(self.known(rows), local, counts, gate_up, down).reshape((choices, x.shape[1]))
        return self.by_expert.unpermute(y, place, gates)[:tokens]


class NodeDispatch(nn.Cell):
    """As AllToAllDispatch, but a token crosses to a node once, however many of its experts are there.

    Devices of the same place in each node exchange tokens with ids and gates; those of a node then exchange rows of
    choices (ExpertExchange), weigh them and add them up before they go back. With DeepSeek's node-limited routing
    (arXiv 2412.19437, section 2.1.2) a token crosses to topk_group nodes at most.
    """

    def __init__(self, config, group: ExpertGroup):
        super().__init__()
        moe, hidden = config.moe_config, config.hidden_size
        self.topk, self.local_experts = moe.num_experts_chosen, moe.expert_num // group.size
        self.nodes, self.node_experts = group.size // group.inner, self.local_experts * group.inner
        self.first_expert = group.rank // group.inner * self.node_experts
        self.balanced = False
        reached, within = min(self.topk, self.nodes), min(self.topk, self.node_experts)
        self.reached = min(reached, max(moe.topk_group * self.nodes // moe.n_group, moe.topk_group))
        arriving = (self.nodes, reached)
        self.find_nodes = NonZero().add_prim_attr(AT_MOST, (reached, self.nodes))
        self.find_rows = NonZero().add_prim_attr(AT_MOST, (within, self.node_experts))
        self.swap_counts = ops.AlltoAll(self.nodes, 0, 0, group.outer_name)
        self.send, self.send_gates = (SendRows(group.outer_name, w, arriving) for w in (hidden, self.topk))
        self.send_ids = SendRows(group.outer_name, self.topk, arriving)
        self.send_back = SendRows(group.outer_name, hidden, arriving[::-1])
        self.to_host = ops.MoveTo()
        most = (group.inner * min(self.topk, self.local_experts), within)
        self.exchange = ExpertExchange(group.inner_name, group.inner, hidden, most)
        self.take_ids, self.take_token, self.take_gates, self.take_row, self.take_gate = (TakeRows() for _ in range(5))
        self.weigh, self.add_choices, self.add_tokens = WeighRows(), AddRows(), AddRows()
        own_last = (group.rank + 1) * self.local_experts - 1
        self.spare_ids = Tensor([[own_last] + [-1] * (self.topk - 1)], mstype.int32)
        self.node = Tensor(np.arange(self.nodes, dtype=np.int32).reshape(1, -1, 1))
        self.expert = Tensor(np.arange(self.node_experts, dtype=np.int32).reshape(1, -1, 1) + self.first_expert)
        self.choice = Tensor([list(range(self.topk))], mstype.int32)
        self.is_expert, self.is_token = Tensor([[1, 0]], mstype.int32), Tensor([[0, 1]], mstype.int32)

    def assume_balanced(self) -> None:
        """Let every token cross to as many nodes as it may: where memory is planned, counts must be constants."""
        self.balanced = True

    def run(self, x, topk_weights, topk_ids, gate_up, down):
        """Mix the experts' outputs; arguments and result as `DroplessDispatch.run`."""
        tokens = x.shape[0]
        x = ops.concat((x, ops.zeros((1, x.shape[1]), x.dtype)), 0)  # one token more for this device's last expert
        ids = ops.concat((ops.stop_gradient(topk_ids), self.spare_ids), 0)
        gates = ops.concat((topk_weights, ops.zeros((1, self.topk), topk_weights.dtype)), 0)
        needed = self._any(ids // self.node_experts, self.node)  # (nodes, T + 1)
        token, sent, received = self._crossing(needed, tokens + 1)
        there = self.send(self.take_token(x, token), sent, received)
        gates = self.send_gates(self.take_gates(gates, token), sent, received)
        ids = self.send_ids(self.take_ids(ids, token), sent, received)
        y = self._inside(there, gates, ids, gate_up, down)
        y = self.send_back(y, received, sent)
        return self.add_tokens(ops.stop_gradient(x), token, y)[:tokens]

    def _crossing(self, needed, tokens: int):
        """The token of each row that crosses, by node (R,), and how many go to and come from each node."""
        if self.balanced:
            parts = equal_parts(tokens * self.reached, self.nodes)
            return ops.cast(ops.arange(tokens * self.reached), mstype.int32) // self.reached, parts, parts
        counts = needed.sum(1).reshape((self.nodes, 1))
        arriving = self.swap_counts(counts)
        place = ops.cast(self.find_nodes(ops.cast(needed, mstype.int32).reshape((-1,))).reshape((-1,)), mstype.int32)
        return place_within(place, tokens), self._to_host(counts), self._to_host(arriving)

    def _inside(self, x, gates, ids, gate_up, down):
        """The node's experts on the tokens that arrived: (N, H), a sum over each token's choices here."""
        chosen = self._any(ids, self.expert)  # (experts of the node, N)
        if self.balanced:
            coordinates = ops.zeros((x.shape[0] * self.topk // self.reached, 2), mstype.int32)
        else:
            coordinates = ops.cast(self.find_rows(ops.cast(chosen, mstype.int32)), mstype.int32)
        expert = ops.cast((coordinates * self.is_expert).sum(1), mstype.int32)
        token = ops.cast((coordinates * self.is_token).sum(1), mstype.int32)
        is_choice = self.take_ids(ids, token) == (expert + self.first_expert).reshape((-1, 1))  # (R, K)
        choice = ops.cast((ops.cast(is_choice, mstype.int32) * self.choice).sum(1), mstype.int32)
        choice = ops.select(token < 0, token, token * self.topk + choice)  # on CPU, behind the real rows
        weight = self.take_gate(gates.reshape((-1,)), choice)
        local = place_within(expert, self.local_experts).reshape((-1, 1))
        y = self.exchange(self.take_row(x, token), local, chosen.sum(1), gate_up, down)
        y = self.weigh(y, ops.cast(weight, y.dtype).reshape((-1, 1)))
        return self.add_choices(ops.stop_gradient(x), token, y)

    @staticmethod
    def _any(ids, wanted):
        """1.0 where one of a token's ids (N, K) is wanted (1, W, 1): (W, N)."""
        hits = ops.cast(ids.transpose((1, 0)).expand_dims(1) == wanted, mstype.float32)  # (K, W, N)
        return ops.cast(hits.sum(0) > 0, mstype.float32)

    def _to_host(self, counts):
        return self.to_host(ops.cast(counts.reshape((-1,)), mstype.int64), "CPU", True)


def place_within(numbers, size: int):
    """Numbers modulo `size`; those below 0 stay below 0."""
    return numbers - ops.maximum(numbers // size, 0) * size


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
    kinds = {"alltoall": AllToAllDispatch, "alltoall_deredundency": NodeDispatch}
    kind = kinds.get(moe.moe_token_dispatcher_type) if group.size > 1 else None
    return (kind or DroplessDispatch)(config, group)
