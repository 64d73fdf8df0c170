"""The one place where an operator is chosen: Ascend's fused operator when the YAML asks for it, else basic ones.

Extends `mindformers/modules/layers.py` and `modules/transformer/moe.py` (1.9.0), where each cell picks its own. The
basic path computes the same numbers on any device, so what trains on CPU is what trains on Ascend.

Legend: T tokens, H hidden, F expert width, L experts of this device, R rows of tokens sorted by expert.
"""

import os

import mindspore as ms
from mindspore import dtype as mstype
from mindspore import nn, ops
from mindspore.ops.auto_generate import GroupedMatmul, RmsNorm, RotaryPositionEmbedding, SiLU, Swiglu


def fused(flag: bool) -> bool:
    """True when a fused operator is asked for and the device that will run the graph has it."""
    runs_on_cpu = os.environ.get("CPU_PARALLEL_COMPILE") == "1"  # a rank's graph that cpu_parallel lowers to CPU
    return bool(flag) and ms.get_context("device_target") == "Ascend" and not runs_on_cpu


class BasicRmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype (HF DeepseekV3RMSNorm)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps
        self.square, self.mean, self.rsqrt = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Rsqrt()
        self.add_eps, self.normalize, self.scale = ops.Add(), ops.Mul(), ops.Mul()

    def construct(self, x, weight):
        scale = self.rsqrt(self.add_eps(self.mean(self.square(x), -1), self.eps))
        return self.scale(self.normalize(x, scale), weight)


class FusedRmsNorm(nn.Cell):
    """Ascend's RmsNorm."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = RmsNorm(eps)

    def construct(self, x, weight):
        return self.norm(x, weight)[0]


class BasicRotary(nn.Cell):
    """Turn each pair (x_2i, x_2i+1) by its angle (IM apply_rotary_emb).

    The result holds all first members, then all second ones: queries and keys share the order, so their products do
    not change, and no interleaving back is needed (HF apply_rotary_pos_emb_interleave does the same).
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = ops.StridedSlice(), ops.StridedSlice()
        self.first_cos, self.first_sin, self.second_cos, self.second_sin = (ops.Mul() for _ in range(4))
        self.sub, self.add, self.cat = ops.Sub(), ops.Add(), ops.Concat(-1)

    def construct(self, x, cos, sin):
        a = self.first(x, (0, 0, 0, 0), x.shape, (1, 1, 1, 2))
        b = self.second(x, (0, 0, 0, 1), x.shape, (1, 1, 1, 2))
        cos, sin = cos[..., ::2], sin[..., ::2]  # the tables hold each angle twice
        turned_a = self.sub(self.first_cos(a, cos), self.second_sin(b, sin))
        turned_b = self.add(self.second_cos(b, cos), self.first_sin(a, sin))
        return self.cat((turned_a, turned_b))


class FusedRotary(nn.Cell):
    """Ascend's RotaryPositionEmbedding, interleaved mode."""

    def __init__(self):
        super().__init__()
        self.rotary = RotaryPositionEmbedding()

    def construct(self, x, cos, sin):
        return self.rotary(x, cos, sin, 1)


class BlockedSwiGlu(nn.Cell):
    """SwiGLU of each row's own expert without a grouped matmul.

    Rows of an expert are padded to whole blocks; a block meets one expert's weights in a batched matmul. The number
    of blocks is static: R / block + L covers every split of R rows over L experts.
    """

    def __init__(self):
        super().__init__()
        self.gate_up_mul, self.down_mul = ops.BatchMatMul(), ops.BatchMatMul()
        self.halve = ops.Split(-1, 2)
        self.silu = SiLU()
        self.cumsum = ops.CumSum()

    def construct(self, x, expert_of_row, counts, gate_up, down):
        rows, hidden = x.shape
        experts = counts.shape[0]
        block = block_rows(rows, experts)
        blocks = rows // block + experts
        padded = (counts + block - 1) // block * block
        padded_end, end = self._ends(padded), self._ends(counts)
        expert = ops.minimum(expert_of_row, experts - 1)
        shift = ops.gather(padded_end - padded - end + counts, expert, 0)
        place = ops.cast(ops.arange(rows), mstype.int32) + shift
        spare = blocks * block  # rows of no expert of this device end here
        place = ops.select(expert_of_row < experts, place, ops.full_like(place, spare))
        source = ops.full((spare + 1,), rows, dtype=mstype.int32)
        source = ops.tensor_scatter_elements(source, place, ops.cast(ops.arange(rows), mstype.int32), 0)[:-1]
        zero_row = ops.zeros((1, hidden), x.dtype)
        blocked = ops.gather(ops.concat((x, zero_row), 0), source, 0).reshape((blocks, block, hidden))
        starts = ops.cast(ops.arange(blocks), mstype.int32) * block
        owner = ops.cast(starts.expand_dims(1) >= padded_end.expand_dims(0), mstype.int32).sum(1)
        owner = ops.minimum(owner, experts - 1)
        gate, up = self.halve(self.gate_up_mul(blocked, ops.gather(gate_up, owner, 0)))
        y = self.down_mul(self.silu(gate) * up, ops.gather(down, owner, 0)).reshape((-1, hidden))
        return ops.gather(ops.concat((y, zero_row), 0), place, 0)

    def _ends(self, counts):
        return ops.cast(self.cumsum(ops.cast(counts, mstype.float32), 0), mstype.int32)


class GroupedSwiGlu(nn.Cell):
    """SwiGLU of each row's own expert with Ascend's grouped matmul."""

    def __init__(self):
        super().__init__()
        self.gate_up_mul, self.down_mul = GroupedMatmul(3, 0), GroupedMatmul(3, 0)
        self.swiglu = Swiglu()
        self.cumsum = ops.CumSum()

    def construct(self, x, expert_of_row, counts, gate_up, down):
        group_list = ops.cast(self.cumsum(ops.cast(counts, mstype.float32), 0), mstype.int64)
        y = self.gate_up_mul([x], [gate_up], None, None, None, None, None, group_list)[0]
        y = self.down_mul([self.swiglu(y, -1)], [down], None, None, None, None, None, group_list)[0]
        # the operator leaves rows after the last group untouched: make them zero, whatever the memory held
        mine = (expert_of_row < counts.shape[0]).expand_dims(-1)
        return ops.select(ops.broadcast_to(mine, y.shape), y, ops.zeros_like(y))


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: a power of two near the mean rows of an expert, 16 to 256."""
    block = 16
    while block < 256 and block * 2 <= max(rows // experts, 1):
        block *= 2
    return min(block, rows)


def rms_norm(config) -> nn.Cell:
    """Cell (x, weight) -> x's shape."""
    return FusedRmsNorm(config.rms_norm_eps) if fused(config.use_fused_rms_norm) else BasicRmsNorm(config.rms_norm_eps)


def rotary(config) -> nn.Cell:
    """Cell (x (B, N, S, D), cos, sin (., 1, S, D)) -> x's shape; dtype rotary_dtype."""
    if fused(config.use_fused_rope):
        return FusedRotary()
    return BasicRotary()


def grouped_swiglu(config) -> nn.Cell:
    """Cell (x (R, H) sorted by expert, expert_of_row (R,), counts (L,), gate_up (L, H, 2F), down (L, F, H)) -> (R, H).

    `expert_of_row` is L for rows that belong to no expert here; they come last and give zero.
    """
    return GroupedSwiGlu() if fused(config.moe_config.use_gmm) else BlockedSwiGlu()
