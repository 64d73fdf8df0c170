"""The one place where an operator is chosen: the device's fused operator when the YAML asks for it, else basic ones.

Extends `mindformers/modules/layers.py` and `modules/transformer/moe.py` (1.9.0), where each cell picks its own. Fused
operators are MindSpore's on Ascend and those of `cpu_kernels` on CPU; the basic path computes the same numbers on any
device, so what trains on CPU is what trains on Ascend.

Legend: T tokens, H hidden, F expert width, L experts of this device, R rows of tokens sorted by expert.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import Embedding as EmbeddingOperator
from mindspore.ops.auto_generate import (
    GroupedMatmul,
    MoeTokenPermute,
    MoeTokenUnpermute,
    RmsNorm,
    RotaryPositionEmbedding,
    ScatterAddExt,
    ScatterValue,
    SiLU,
    SplitWithSize,
    Swiglu,
    TopkExt,
)
from mindspore.ops.operations.nn_ops import FlashAttentionScore

from mindformers_ext.cpu_kernels import cells

HALVES, INTERLEAVED = 0, 1  # modes of RotaryPositionEmbedding
MASKED = -3.0e38  # added to a float32 score that may not be attended


def fused(flag: bool) -> bool:
    """True when a fused operator is asked for and the graph is compiled for Ascend (cpu_parallel lowers it to CPU)."""
    return bool(flag) and ms.get_context("device_target") == "Ascend"


def on_cpu(flag: bool = True) -> bool:
    """True when a fused operator is asked for and the kernels of `cpu_kernels` run it."""
    sharded = ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")
    return bool(flag) and ms.get_context("device_target") == "CPU" and not sharded


class BasicRmsNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in `dtype` (HF DeepseekV3RMSNorm)."""

    def __init__(self, eps: float, dtype):
        super().__init__()
        self.eps, self.dtype = eps, dtype
        self.square, self.mean, self.rsqrt = ops.Square(), ops.ReduceMean(keep_dims=True), ops.Rsqrt()
        self.add_eps, self.normalize, self.scale = ops.Add(), ops.Mul(), ops.Mul()

    def construct(self, x, weight):
        value = ops.cast(x, self.dtype)
        scale = self.rsqrt(self.add_eps(self.mean(self.square(value), -1), self.eps))
        return ops.cast(self.scale(self.normalize(value, scale), ops.cast(weight, self.dtype)), x.dtype)


class FusedRmsNorm(nn.Cell):
    """Ascend's RmsNorm, which computes in float32 whatever it reads (CANN: aclnnRmsNorm.md)."""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = RmsNorm(eps)

    def construct(self, x, weight):
        return self.norm(x, ops.cast(weight, mstype.float32))[0]


class BasicAttention(nn.Cell):
    """softmax(query key^T * scale + mask) value, with the S x S scores in memory; softmax in softmax_compute_type."""

    def __init__(self, config, scale: float):
        super().__init__()
        self.scale, self.softmax_type = scale, getattr(mstype, config.softmax_compute_type)
        self.scale_query = ops.Mul()
        self.query_key = ops.BatchMatMul(transpose_b=True)
        self.add_mask = ops.Add()
        self.softmax = ops.Softmax(-1)
        self.weigh_value = ops.BatchMatMul()

    def construct(self, query, key, value, mask):
        return self.with_scores(query, key, value, mask)[0]

    def with_scores(self, query, key, value, mask):
        """The context, and scores (B, N, S, ...) with the largest of every query among them."""
        return self.with_weights(query, key, value, mask)[:2]

    def with_weights(self, query, key, value, mask):
        """The context, the scores, and what the softmax makes of them, (B, N, S, S) both."""
        scores = self.query_key(self.scale_query(query, self.scale), key)  # (B, N, S, S)
        scores = self.add_mask(ops.cast(scores, self.softmax_type), mask)
        weights = self.softmax(scores)
        return self.weigh_value(ops.cast(weights, value.dtype), value), scores, weights


@dataclass(frozen=True)
class SequencePart:
    """What a device has of every sequence: part `index` of `count` of the queries, and so many heads."""

    heads: int
    index: int = 0
    count: int = 1


class PackedFlashAttention(nn.Cell):
    """Ascend's FlashAttentionScore over the documents of packed samples, as a device runs it on its own part.

    The operator's layout TND takes tokens (T, N, D) and where documents end, counted over all of a device's tokens
    (MindFormers' use_eod_attn_mask_compression). With a part of the queries a document's last query meets its last key
    that precedes the part's end (sparse_mode 3), and documents outside of the part have no query. Those that only fill
    the list have no tokens at all; each sample gets one more of them, whose end is the sample's.
    """

    def __init__(self, config, scale: float, part: SequencePart):
        super().__init__()
        self.part = part
        self.attention = FlashAttentionScore(
            head_num=part.heads, scale_value=scale, input_layout="TND", sparse_mode=3, next_tokens=0
        )
        self.triangle = Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))
        self.to_tokens, self.add_end = ops.Transpose(), ops.Concat(1)

    def construct(self, query, key, value, ends):
        """The context (B, N, S/count, Dv), and the largest score of every query, (B, N, S/count, 8).

        query (B, N, S/count, D), key and value (B, N, S, D or Dv), ends (B, L) int32.
        """
        batch, own, length = query.shape[0], query.shape[2], key.shape[2]
        first = self.part.index * own
        ends = self.add_end((ends, ops.full((batch, 1), length, dtype=mstype.int32)))
        sample = ops.arange(batch).astype(mstype.int32).reshape((batch, 1))
        query_ends = ops.clamp(ends - first, 0, own) + sample * own
        key_ends = ends if self.part.count == 1 else self._seen(ends, first + own, length)
        found = self.attention(
            self._tokens(query),
            self._tokens(key),
            self._tokens(value),
            None,
            None,
            None,
            self.triangle,
            None,
            query_ends.reshape((-1,)),
            (key_ends + sample * length).reshape((-1,)),
        )
        return self._by_heads(found[3], batch), self._by_heads(found[0], batch)

    def _by_heads(self, x, batch):
        """(B, N, S, D) <- (B*S, N, D)."""
        return self.to_tokens(x.reshape((batch, -1, self.part.heads, x.shape[-1])), (0, 2, 1, 3))

    def _tokens(self, x):
        """(B*S, N, D) <- (B, N, S, D)."""
        return self.to_tokens(x, (0, 2, 1, 3)).reshape((-1, self.part.heads, x.shape[-1]))

    def _seen(self, ends, last, length):
        """Where the keys of each document end that precede `last`; the end of the sample stays."""
        return self.add_end((ops.minimum(ends[:, :-1], last), ops.full_like(ends[:, -1:], length)))


class FlashAttention(nn.Cell):
    """Ascend's FlashAttentionScore; values may be narrower than keys (CANN: aclnnFlashAttentionScore.md).

    Args:
        packed: what runs as PackedFlashAttention where the mask is the ends of documents.
    """

    def __init__(self, config, scale: float, packed: Callable):
        super().__init__()
        self.packed = packed
        common = dict(head_num=config.num_heads, scale_value=scale, input_layout="BNSD")
        self.causal = FlashAttentionScore(sparse_mode=2, **common)  # its mask is always the 2048 x 2048 triangle
        self.masked = FlashAttentionScore(sparse_mode=0, **common)
        self.triangle = Tensor(np.triu(np.ones((2048, 2048), np.uint8), 1))

    def construct(self, query, key, value, mask):
        return self.with_scores(query, key, value, mask)[0]

    def with_scores(self, query, key, value, mask):
        """The context, and the largest score of every query, (B, N, S, 8)."""
        if mask is not None and len(mask.shape) == 2:
            return self.packed(query, key, value, mask)
        if mask is None:
            found = self.causal(query, key, value, None, None, None, self.triangle, None)
        else:
            found = self.masked(query, key, value, None, None, None, mask, None)
        return found[3], found[0]


class BasicRotary(nn.Cell):
    """Turn each pair (x_2i, x_2i+1) by its angle (IM apply_rotary_emb).

    The result holds all first members, then all second ones: queries and keys share the order, so their products do
    not change, and no interleaving back is needed (HF apply_rotary_pos_emb_interleave does the same).

    Args:
        halves: the pairs are (x_i, x_{i + D/2}) instead.
    """

    def __init__(self, halves: bool = False):
        super().__init__()
        self.halves = halves
        self.first, self.second = ops.StridedSlice(), ops.StridedSlice()
        self.first_cos, self.first_sin, self.second_cos, self.second_sin = (ops.Mul() for _ in range(4))
        self.sub, self.add, self.cat = ops.Sub(), ops.Add(), ops.Concat(-1)

    def construct(self, x, cos, sin):
        half = x.shape[3] // 2
        step, start = (1, half) if self.halves else (2, 1)
        a = self.first(x, (0, 0, 0, 0), (*x.shape[:3], half * step), (1, 1, 1, step))
        b = self.second(x, (0, 0, 0, start), x.shape, (1, 1, 1, step))
        cos, sin = cos[..., ::2], sin[..., ::2]  # the tables hold each angle twice
        turned_a = self.sub(self.first_cos(a, cos), self.second_sin(b, sin))
        turned_b = self.add(self.second_cos(b, cos), self.first_sin(a, sin))
        return self.cat((turned_a, turned_b))


class FusedRotary(nn.Cell):
    """Ascend's RotaryPositionEmbedding, interleaved mode; cos and sin (1, 1, S, D)."""

    def __init__(self):
        super().__init__()
        self.rotary = RotaryPositionEmbedding()

    def construct(self, x, cos, sin):
        return self.rotary(x, cos, sin, INTERLEAVED)


class FusedRotaryBySample(nn.Cell):
    """Ascend's RotaryPositionEmbedding with tables of each sequence, cos and sin (B, 1, S, D).

    Interleaved mode takes one table for all (CANN: rope_interleaved_tiling.cpp), half mode takes these, and turns
    (x_i, x_{i + D/2}): pairs are sorted first. The result keeps that order, as BasicRotary's does.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second, self.cat = ops.StridedSlice(), ops.StridedSlice(), ops.Concat(-1)
        self.rotary = RotaryPositionEmbedding()

    def construct(self, x, cos, sin):
        a = self.first(x, (0, 0, 0, 0), x.shape, (1, 1, 1, 2))
        b = self.second(x, (0, 0, 0, 1), x.shape, (1, 1, 1, 2))
        cos, sin = cos[..., ::2], sin[..., ::2]  # the tables hold each angle twice, side by side
        cos, sin = ops.concat((cos, cos), -1), ops.concat((sin, sin), -1)
        return self.rotary(self.cat((a, b)), cos, sin, HALVES)


class BasicSwiGlu(nn.Cell):
    """silu(gate) * up."""

    def __init__(self):
        super().__init__()
        self.silu, self.gate_mul = SiLU(), ops.Mul()

    def construct(self, gate, up):
        return self.gate_mul(self.silu(gate), up)


class TableRows(nn.Cell):
    """Rows of a table by Ascend's operator."""

    def __init__(self):
        super().__init__()
        self.look_up = EmbeddingOperator()

    def construct(self, weight, ids):
        return self.look_up(ids, weight, None, None, 2.0, False)


class GatherRows(nn.Cell):
    """Rows of a table, (T, H) in `out_type`, by an operator that MindSpore's compiler splits."""

    def __init__(self, out_type):
        super().__init__()
        self.gather, self.out_type = ops.Gather(), out_type

    def construct(self, weight, ids):
        return ops.cast(self.gather(weight, ids, 0), self.out_type)


class AddAt(nn.Cell):
    """x (T, V) with `values` (T, 1) added in the columns `place` (T, 1)."""

    def __init__(self):
        super().__init__()
        self.add = ScatterAddExt() if fused(True) else None

    def construct(self, x, place, values):
        if self.add is not None:
            return self.add(x, 1, place, values)
        return ops.tensor_scatter_elements(x, place, values, 1, "add")


class Topk(nn.Cell):
    """The k largest of the last axis, the largest first, and their places, int32. They are kept for the backward."""

    def __init__(self):
        super().__init__()
        self.select = (TopkExt() if fused(True) else ops.TopK(sorted=True)).recompute(False)

    def construct(self, x, k):
        values, places = self.select(x, k)
        return values, ops.cast(places, mstype.int32)


class Chosen(nn.Cell):
    """(T, width) float32 with 1.0 where a row has chosen a column, ids (T, K), else 0.0."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.mark = width, ScatterValue()

    def construct(self, ids):
        empty = ops.zeros((ids.shape[0], self.width), mstype.float32)
        return self.mark(empty, 1, ops.stop_gradient(ids), 1.0)


class ColumnSplit(nn.Cell):
    """The first `width` columns of x (..., D) and the rest; the gradient joins the two."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.split = width, SplitWithSize()

    def construct(self, x):
        return self.split(x, (self.width, x.shape[-1] - self.width), -1)


class BasicPermute(nn.Cell):
    """Sort tokens by expert, and mix what the experts made of them back into token order."""

    def __init__(self):
        super().__init__()
        self.sort = ops.Sort()

    def permute(self, x, ids, rows: int):
        """Rows (rows, H) by expert, from x (T, H) and ids (T, K), and the row (T*K,) of each choice."""
        _, order = self.sort(ops.cast(ids.reshape((-1,)), mstype.float32))  # (T*K,)
        _, place = self.sort(ops.cast(order, mstype.float32))
        return ops.gather(x, order[:rows] // ids.shape[1], 0), place

    def unpermute(self, y, place, gates):
        """(T, H) <- rows y (rows, H) weighed with gates (T, K); rows that were cut off carry gate 0."""
        chosen = ops.gather(y, ops.minimum(place, y.shape[0] - 1), 0).reshape(gates.shape + (y.shape[1],))
        return (chosen * ops.cast(gates, y.dtype).expand_dims(-1)).sum(1)


class FusedPermute(nn.Cell):
    """Ascend's MoeTokenPermute and MoeTokenUnpermute."""

    def __init__(self):
        super().__init__()
        self.permute_tokens, self.unpermute_tokens = MoeTokenPermute(), MoeTokenUnpermute()

    def permute(self, x, ids, rows: int):
        """As BasicPermute's; rows is all of T*K."""
        return self.permute_tokens(x, ids, rows, False)

    def unpermute(self, y, place, gates):
        """As BasicPermute's."""
        return self.unpermute_tokens(y, place, ops.cast(gates, y.dtype), False, None)


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

    def construct(self, x, counts, gate_up, down):
        rows, hidden = x.shape
        experts = counts.shape[0]
        block = block_rows(rows, experts)
        blocks = rows // block + experts
        padded = (counts + block - 1) // block * block
        padded_end, end = ends(padded), ends(counts)
        row = ops.cast(ops.arange(rows), mstype.int32)
        expert = owner_of(row, end)  # (R,), L for rows that no expert here takes
        shift = ops.gather(padded_end - padded - end + counts, ops.minimum(expert, experts - 1), 0)
        spare = blocks * block  # where rows without expert go
        place = ops.select(expert < experts, row + shift, ops.full_like(row, spare))
        source = ops.full((spare + 1,), rows, dtype=mstype.int32)
        source = ops.tensor_scatter_elements(source, place, row, 0)[:-1]
        zero_row = ops.zeros((1, hidden), x.dtype)
        blocked = ops.gather(ops.concat((x, zero_row), 0), source, 0).reshape((blocks, block, hidden))
        owner = owner_of(ops.cast(ops.arange(blocks), mstype.int32) * block, padded_end)
        owner = ops.minimum(owner, experts - 1)
        gate, up = self.halve(self.gate_up_mul(blocked, ops.gather(gate_up, owner, 0)))
        y = self.down_mul(self.silu(gate) * up, ops.gather(down, owner, 0)).reshape((-1, hidden))
        return ops.gather(ops.concat((y, zero_row), 0), place, 0)


class MaskedGradient(nn.Cell):
    """x (R, H) itself; its gradient is zero in the rows that are spare (R, 1)."""

    def construct(self, x, spare):
        return x

    def bprop(self, x, spare, out, dout):
        return ops.masked_fill(dout, spare, 0.0), ops.zeros_like(spare)


class MaskedResult(nn.Cell):
    """x (R, H) with zeros in the rows that are spare (R, 1). Their gradient is as it comes: nothing reads it."""

    def construct(self, x, spare):
        return ops.masked_fill(x, spare, 0.0)

    def bprop(self, x, spare, out, dout):
        return dout, ops.zeros_like(spare)


class GroupedSwiGlu(nn.Cell):
    """SwiGLU of each row's own expert with Ascend's grouped matmul.

    The operator neither reads nor writes rows after the last group, of its result and of the gradient of its input.
    What the memory held there must reach nobody: the result and the gradient that leave this cell are zero there.
    """

    def __init__(self):
        super().__init__()
        self.mask_gradient, self.mask_result = MaskedGradient(), MaskedResult()
        self.gate_up_mul, self.down_mul = GroupedMatmul(3, 0), GroupedMatmul(3, 0)
        self.swiglu = Swiglu()

    def construct(self, x, counts, gate_up, down):
        end = ends(counts)
        group_list = ops.cast(end, mstype.int64)
        spare = ops.cast(ops.arange(x.shape[0]), mstype.int32).expand_dims(-1) >= end[-1]
        x = self.mask_gradient(x, spare)
        y = self.gate_up_mul([x], [gate_up], None, None, None, None, None, group_list)[0]
        y = self.down_mul([self.swiglu(y, -1)], [down], None, None, None, None, None, group_list)[0]
        return self.mask_result(y, spare)


class SortedExperts(nn.Cell):
    """The routed experts of this device in three steps: sort tokens by expert, grouped SwiGLU, mix back.

    (T, H) <- x (T, H), gates (T, K) float32, ids (T, K) int32, gate_up (L, H, 2F), down (L, F, H). A choice whose id
    lies outside 0..L-1 belongs to another device and counts nothing.
    """

    def __init__(self, config, local_experts: int):
        super().__init__()
        self.local_experts, self.topk = local_experts, config.moe_config.num_experts_chosen
        self.permute = token_permute(config, local_experts)
        self.swiglu = grouped_swiglu(config)
        self.one_hot = ops.OneHot()
        self.one, self.zero = Tensor(1, mstype.int32), Tensor(0, mstype.int32)

    def construct(self, x, gates, ids, gate_up, down):
        mine = ops.logical_and(ids >= 0, ids < self.local_experts)
        ids = ops.select(mine, ids, ops.full_like(ids, self.local_experts))  # others sort last
        rows = x.shape[0] * min(self.topk, self.local_experts)  # most rows that can choose this device's experts
        counts = self.one_hot(ids.reshape((-1,)), self.local_experts, self.one, self.zero).sum(0)  # (L,)
        sorted_x, place = self.permute.permute(x, ids, rows)  # (rows, H) <- (T, H)
        sorted_y = self.swiglu(sorted_x, counts, gate_up, down)
        return self.permute.unpermute(sorted_y, place, gates * ops.cast(mine, mstype.float32))


def ends(counts):
    """Where each group of rows ends: cumulative counts (L,) int32, exact below 2^24 rows."""
    return ops.cast(ops.cumsum(ops.cast(counts, mstype.float32), 0), mstype.int32)


def owner_of(rows, end):
    """Index of the group a row lies in: (R,) int32, L after the last group."""
    return ops.cast(rows.expand_dims(1) >= end.expand_dims(0), mstype.int32).sum(1)


def block_rows(rows: int, experts: int) -> int:
    """Rows of a block: a power of two near the mean rows of an expert, 16 to 256."""
    block = 16
    while block < 256 and block * 2 <= max(rows // experts, 1):
        block *= 2
    return min(block, rows)


def rms_norm(config, eps: float) -> nn.Cell:
    """Cell (x, weight) -> x's shape and dtype; computed in `layernorm_compute_type`, fused always in float32."""
    if on_cpu(config.use_fused_rms_norm):
        return cells.RmsNorm(eps)
    if fused(config.use_fused_rms_norm):
        return FusedRmsNorm(eps)
    return BasicRmsNorm(eps, getattr(mstype, config.layernorm_compute_type))


def core_attention(config, scale: float, part: SequencePart, locally: Callable) -> nn.Cell:
    """Cell (query, key (B, N, S, Dqk), value (B, N, S, Dv), mask of `score_mask`) -> (B, N, S, Dv).

    Args:
        locally: makes a program of one device's `part` one of all devices.
    """
    if on_cpu(config.use_flash_attention):
        return cells.FlashAttention(scale)
    if fused(config.use_flash_attention):
        return FlashAttention(config, scale, locally(PackedFlashAttention(config, scale, part)))
    return BasicAttention(config, scale)


def latent_attention(config, scale: float) -> nn.Cell | None:
    """Cell that makes MLA's context from its projections in one operator (see cells.LatentAttention).

    None where heads, rotation and attention are operators of their own.
    """
    at_once = config.use_flash_attention and config.use_fused_rope and config.rotary_dtype == "float32"
    return cells.LatentAttention(config.num_heads, scale) if on_cpu(at_once) else None


def split_columns(width: int) -> nn.Cell:
    """Cell x (..., D) -> its first `width` columns and the rest."""
    return cells.SplitColumns(width) if on_cpu() else ColumnSplit(width)


def activation_type(config):
    """Type of values between operators: compute_dtype; on CPU, which cannot cut, add or repeat bfloat16, float32.

    There the kernels convert: matrix products take bfloat16, sum in float32 and round their result to bfloat16.
    """
    return mstype.float32 if on_cpu() else getattr(mstype, config.compute_dtype)


def score_mask(config):
    """Function (sequence length, attention_mask, ends of documents (B, L)) -> the mask that `core_attention` takes.

    In attention_mask, 1 may not be attended.
    """
    flash = config.use_flash_attention
    return flash_mask if fused(flash) or on_cpu(flash) else additive_mask


def flash_mask(seq: int, attention_mask=None, ends=None):
    """None for causal attention, which the operator knows itself; the ends of documents; else uint8."""
    if ends is not None:
        return ends
    return None if attention_mask is None else ops.cast(attention_mask, mstype.uint8)


def additive_mask(seq: int, attention_mask=None, ends=None):
    """(1 or B, 1, S, S) float32: MASKED where a key may not be attended."""
    if attention_mask is None:
        place = ops.arange(seq)
        attention_mask = place.reshape((1, 1, 1, seq)) > place.reshape((1, 1, seq, 1))
        if ends is not None:
            document = documents_before(ends, place)
            other = document.reshape((-1, 1, seq, 1)) != document.reshape((-1, 1, 1, seq))
            attention_mask = ops.logical_or(attention_mask, other)
    return ops.cast(attention_mask, mstype.float32) * MASKED


def documents_before(ends, place):
    """How many documents end before each place (S,), (B, S) float32, by their ends (B, L)."""
    return ops.cast(ends.expand_dims(1) <= place.reshape((1, -1, 1)), mstype.float32).sum(-1)


def rotary(config, by_sample: bool = False) -> nn.Cell:
    """Cell (x (B, N, S, D), cos, sin (1, 1, S, D), `by_sample` (B, 1, S, D)) -> x's shape; dtype rotary_dtype.

    The order of the result's columns is the cell's own: queries and keys must come from the same kind.
    """
    if on_cpu(config.use_fused_rope):
        return cells.Rotary()
    if fused(config.use_fused_rope):
        return FusedRotaryBySample() if by_sample else FusedRotary()
    return BasicRotary()


def swiglu(config) -> nn.Cell:
    """Cell (gate, up) -> silu(gate) * up."""
    return cells.SwiGlu() if on_cpu(config.use_fused_swiglu) else BasicSwiGlu()


def feed_forward(config) -> nn.Cell | None:
    """Cell (x (T, H), gate (F, H), up (F, H), down (H, F)) -> down(silu(gate x) * up x), (T, H), in one operator.

    None where products and activation are operators of their own.
    """
    return cells.FeedForward() if on_cpu(config.use_fused_swiglu) else None


def matrix_product():
    """Operator (x (T, I), weight (O, I)) -> (T, O); MindSpore's own refuses bfloat16 on CPU."""
    return cells.Linear() if on_cpu() else ops.MatMul(transpose_b=True)


def table_rows() -> nn.Cell:
    """Cell (weight (V, H), ids (T,)) -> (T, H)."""
    return cells.Embedding() if on_cpu() else TableRows()


def head_loss(config) -> nn.Cell | None:
    """Cell (hidden (T, H), weight (V, H), labels (T,), mask (T,)) -> mean cross entropy (1,), for training.

    It keeps no logits. None where logits and loss are two steps.
    """
    return cells.LinearCrossEntropy() if on_cpu(config.use_fused_cross_entropy) else None


def topk_select(config) -> nn.Cell | None:
    """Cell that chooses experts from logits in one operator (see cells.TopkSelect); None where only basic ones run.

    No operator of MindSpore 2.9 on Ascend selects as DeepSeek does.
    """
    moe = config.moe_config
    if not on_cpu(moe.use_fused_ops_topkrouter):
        return None
    limits_groups = moe.topk_method != "greedy" and moe.topk_group < moe.n_group
    return cells.TopkSelect(
        moe.num_experts_chosen,
        moe.n_group if limits_groups else 1,
        moe.topk_group,
        sigmoid=moe.use_gating_sigmoid,
        two_best=moe.topk_method == "noaux_tc",
        normalize=moe.norm_topk_prob,
        scaling=moe.routed_scaling_factor,
    )


def routed_experts(config, local_experts: int) -> nn.Cell:
    """Cell as SortedExperts; on CPU use_gmm and use_fused_ops_permute together make it one operator."""
    moe = config.moe_config
    return cells.RoutedExperts() if on_cpu(moe.use_fused_ops_permute) else SortedExperts(config, local_experts)


def token_permute(config, local_experts: int) -> nn.Cell:
    """Cell with `permute` and `unpermute` of tokens to rows sorted by expert."""
    fits = local_experts >= config.moe_config.num_experts_chosen  # the fused operator keeps all T*K rows
    return FusedPermute() if fused(config.moe_config.use_fused_ops_permute) and fits else BasicPermute()


def grouped_swiglu(config) -> nn.Cell:
    """Cell (x (R, H) sorted by expert, counts (L,) int32, gate_up (L, H, 2F), down (L, F, H)) -> (R, H).

    Rows after the last expert's come out as zero.
    """
    return GroupedSwiGlu() if fused(config.moe_config.use_gmm) else BlockedSwiGlu()
