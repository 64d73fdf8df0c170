"""DeepSeek-V3.2's sparse attention: an indexer selects the keys that a query attends (V3.2-Exp's report, 2.1).

Beside attention a lightning indexer gives every key a score, I_ts = sum_j w_tj relu(q_tj k_s); a query attends the
index_topk keys of the largest ones. The indexer learns by a loss of its own alone, its input is detached:

- warm_up: attention is dense and frozen. The target is what attention weighs keys with, the mean over its heads, and
  the loss KL(target || softmax(I)) over all keys before.
- sparse: the same over the selected keys, while the model learns by its own loss.

FP8 and the Hadamard rotation before it, which changes no product, are left out. Scores and weights are (S, S) matrices
in memory: docs/sparse_attention.md says what this costs.

Legend as in deepseek2_model.py; J heads of the indexer.
"""

import numpy as np
from balance_loss import no_loss
from deepseek2_model import DecoderLayer, MultiHeadLatentAttention
from linear import Linear
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer
from rope import RotaryEmbedding
from sharding import cell_locally, selection_plan, shard

from mindformers_ext.layers.fused_ops import MASKED, BasicRotary, ScatterValue, Topk, split_columns

__all__ = ["SparseDecoderLayer", "SparseLatentAttention"]

NORM_EPS = 1e-6  # of the indexer's norm, whatever rms_norm_eps


class LayerNorm(nn.Cell):
    """Mean 0 and variance 1 over the last axis, then weight and bias; in float32."""

    def __init__(self, config, dim: int):
        super().__init__()
        dtype = getattr(mstype, config.param_init_type)
        self.weight = Parameter(initializer("ones", (dim,), dtype), name="weight")
        self.bias = Parameter(initializer("zeros", (dim,), dtype), name="bias")
        self.norm = ops.LayerNorm(1, 1, NORM_EPS)
        shard(self, "layer_norm", config)

    def construct(self, x):
        weight, bias = ops.cast(self.weight, mstype.float32), ops.cast(self.bias, mstype.float32)
        return ops.cast(self.norm(ops.cast(x, mstype.float32), weight, bias)[0], x.dtype)


class HalvesRotaryEmbedding(RotaryEmbedding):
    """Positions of the indexer, which turns (x_i, x_{i + D/2}), while attention turns (x_2i, x_2i+1)."""

    def __init__(self, config, axes: str):
        super().__init__(config, axes)
        self.rotary, self.rotary_at = BasicRotary(halves=True), BasicRotary(halves=True)
        shard(self.rotary, axes, config)
        shard(self.rotary_at, f"{axes}_at", config)


class LightningIndexer(nn.Cell):
    """The score of every key for every query, (B, 1, S, S) float32, keys after the query included.

    The first qk_rope_head_dim columns of a head have positions.
    """

    def __init__(self, config):
        super().__init__()
        self.num_heads, self.width, self.rope = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = Linear(config, config.q_lora_rank, self.num_heads * self.width, "column_parallel")
        self.wk = Linear(config, config.hidden_size, self.width, "latent")
        self.k_norm = LayerNorm(config, self.width)
        self.weights_proj = Linear(config, config.hidden_size, self.num_heads, "column_parallel")
        self.weights_proj.compute_dtype = self.weights_proj.out_type = mstype.float32  # as transformers keeps it
        self.query_rotary = HalvesRotaryEmbedding(config, "query_rotary")
        self.key_rotary = HalvesRotaryEmbedding(config, "key_rotary")
        self.split_query, self.split_key = split_columns(self.rope), split_columns(self.rope)
        shard(self.split_query, "split_heads", config)
        shard(self.split_key, "split_tokens", config)
        self.to_heads, self.share_key = ops.Transpose(), ops.Tile()
        self.cat_query, self.cat_key = ops.Concat(-1), ops.Concat(-1)
        self.query_key = ops.BatchMatMul(transpose_b=True)
        self.relu, self.weigh, self.sum_heads = ops.ReLU(), ops.Mul(), ops.ReduceSum(keep_dims=True)
        self.scale = (self.width * self.num_heads) ** -0.5  # of products, and of the sum over heads
        shard(self, "indexer", config)

    def construct(self, x, query_latent, seq, position_ids=None):
        """x (T, H) and query_latent (T, q_lora_rank), both detached."""
        q_pe, q_nope = self.split_query(self._heads(self.wq_b(query_latent), seq))  # (B, J, S, rope), (B, J, S, rest)
        query = self.cat_query((self.query_rotary(q_pe, position_ids), q_nope))
        k_pe, k_nope = self.split_key(self.k_norm(self.wk(x)))  # (T, rope), (T, rest): one head
        k_pe = self.key_rotary(k_pe.reshape((-1, 1, seq, self.rope)), position_ids)
        key = self.cat_key((k_pe, k_nope.reshape((-1, 1, seq, self.width - self.rope))))
        products = self.query_key(query, self.share_key(key, (1, self.num_heads, 1, 1)))  # (B, J, S, S)
        weights = self._heads(self.weights_proj(x) * self.scale, seq)  # (B, J, S, 1)
        return self.sum_heads(self.weigh(self.relu(ops.cast(products, mstype.float32)), weights), 1)

    def _heads(self, x, seq):
        """(B, J, S, D) <- (T, J*D)."""
        return self.to_heads(x.reshape((-1, seq, self.num_heads, x.shape[-1] // self.num_heads)), (0, 2, 1, 3))


class Selection(nn.Cell):
    """The mask of the keys with the `count` largest scores: 0 or MASKED, (B, 1, S, S) <- scores with mask."""

    def __init__(self, count: int):
        super().__init__()
        self.count, self.largest, self.mark = count, Topk(), ScatterValue()

    def construct(self, scores):
        rows = scores.reshape((-1, scores.shape[-1]))
        _, places = self.largest(rows, self.count)
        chosen = self.mark(ops.zeros_like(rows), 1, places, 1.0).reshape(scores.shape)
        # A query with fewer keys before it than `count` chooses some that it may not attend.
        allowed = chosen * ops.cast(scores > MASKED / 2, mstype.float32)
        return (1.0 - allowed) * MASKED


class IndexerLoss(nn.Cell):
    """KL(mean over heads of attention's weights || softmax(scores)), the mean over all tokens but padding: (1,)."""

    def __init__(self, config):
        super().__init__()
        self.sum_heads, self.mean_heads = ops.ReduceSum(keep_dims=True), ops.Mul()
        self.log_softmax, self.floor, self.log = ops.LogSoftmax(-1), ops.Maximum(), ops.Log()
        self.difference, self.weigh, self.sum_keys = ops.Sub(), ops.Mul(), ops.ReduceSum()
        self.count, self.total = ops.Mul(), ops.ReduceSum()
        self.share, self.factor = 1.0 / config.num_heads, config.indexer_loss_factor
        self.least = float(np.finfo(np.float32).tiny)
        shard(self, "indexer_loss", config)

    def construct(self, scores, weights, token_mask):
        """scores (B, 1, S, S) with the mask of `weights` (B, N, S, S), token_mask (T, 1)."""
        weights = ops.cast(ops.stop_gradient(weights), mstype.float32)
        target = self.mean_heads(self.sum_heads(weights, 1), self.share)  # a row of it sums to 1
        log_target = self.log(self.floor(target, self.least))
        losses = self.sum_keys(self.weigh(target, self.difference(log_target, self.log_softmax(scores))), -1)
        real = token_mask.reshape(losses.shape)  # (B, 1, S)
        return (self.total(self.count(losses, real)) / (self.total(real) + 1e-8) * self.factor).reshape((1,))


class SparseLatentAttention(MultiHeadLatentAttention):
    """MLA over the keys that its indexer selects, or over all in the warm-up, and the indexer's loss."""

    def __init__(self, config):
        super().__init__(config)
        self.indexer, self.indexer_loss = LightningIndexer(config), IndexerLoss(config)
        self.mask_scores, self.keep_selected = ops.Add(), ops.Add()
        shard(self, "selection", config)
        self.count, self.selects = config.index_topk, not config.warms_up
        self.select = cell_locally(Selection(self.count), _same, _same, selection_plan(), config)
        if self.selects and config.seq_length > self.count:
            shard(self.core_attention, "selected", config)

    def construct(self, x, seq, mask, position_ids, token_mask):
        """(T, H), and the loss (1,), which is 0 outside of training."""
        query_latent = self.query_latent(x)
        scores = self.indexer(ops.stop_gradient(x), ops.stop_gradient(query_latent), seq, position_ids)
        masked = self.mask_scores(scores, mask)
        if self.selects and seq > self.count:
            mask = self.select(ops.stop_gradient(masked))
            masked = self.keep_selected(scores, mask)
        query, key, value = self.by_heads(*self.project(x, query_latent), seq, position_ids)
        context, logits, weights = self.core_attention.with_weights(query, key, value, mask)
        if self.track is not None:
            context = ops.depend(context, self.track(logits))
        loss = self.indexer_loss(masked, weights, token_mask) if self.training else no_loss()
        return self.output(context), loss


def _same(scores):
    """Shape or dtype of a mask <- of the scores."""
    return scores


class SparseDecoderLayer(DecoderLayer):
    """A decoder layer whose attention has a loss of its own: beside x it returns (balance loss, indexer's), (2,)."""

    attention = SparseLatentAttention

    def __init__(self, config, is_moe: bool):
        super().__init__(config, is_moe)
        self.is_balance, self.is_indexer = (Tensor(row) for row in np.eye(2, dtype=np.float32))

    def construct(self, x, mask, token_mask, batch, position_ids=None):
        """As DecoderLayer's."""
        seq = x.shape[0] // batch
        y, of_indexer = self.self_attn(self.input_layernorm(x), seq, mask, position_ids, token_mask)
        x, balance = self.feed_forward(self.add_attention(x, y), token_mask, batch)
        return x, balance * self.is_balance + of_indexer * self.is_indexer
