"""DeepSeek-V2 for MindSpore's graph mode: MLA and DeepSeekMoE, read top to bottom like arXiv 2405.04434.

Legend: B batch, S sequence, T = B*S tokens, H hidden, N heads, D head width, E experts, K experts per token,
V vocabulary. Hidden states are kept flat, (T, H), so that any split of the tokens over devices is a split of one axis.
How operators are split lives in sharding.py, what checkpoints call the weights in weights.py.
"""

from functools import partial

import numpy as np
from attention_logits import LargestLogits
from balance_loss import BalanceLoss, no_loss
from deepseek2_config import DeepseekV2Config
from embedding_and_loss import Embedding, MeanLoss
from linear import Linear
from lora import ExpertAdapters, freeze_base
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer
from rope import RotaryEmbedding, softmax_scale
from sharding import (
    expert_group,
    experts_plan,
    packed_locally,
    place,
    put,
    run_locally,
    sequence_part,
    shard,
    share_graph,
)
from training_interface import TrainingInterface

from mindformers_ext.layers.fused_ops import (
    activation_type,
    core_attention,
    feed_forward,
    head_loss,
    latent_attention,
    rms_norm,
    score_mask,
    split_columns,
    swiglu,
)
from mindformers_ext.layers.moe_dispatch import expert_dispatch
from mindformers_ext.layers.router import TopkRouterV2

__all__ = ["DeepseekV2ForCausalLM", "DeepseekV2Model"]

LATENT_EPS = 1e-6  # of the latents' norms: DeepSeek leaves it at its norm's default, whatever rms_norm_eps (facts 9)


class RMSNorm(nn.Cell):
    """Root-mean-square norm over the last axis, computed in `layernorm_compute_type`; eps None is rms_norm_eps."""

    def __init__(self, config, dim: int, axes: str, eps: float | None = None):
        super().__init__()
        self.weight = Parameter(initializer("ones", (dim,), getattr(mstype, config.param_init_type)), name="weight")
        self.norm = rms_norm(config, config.rms_norm_eps if eps is None else eps)
        shard(self.norm, axes, config)

    def construct(self, x):
        return self.norm(x, self.weight)


class MultiHeadLatentAttention(nn.Cell):
    """MLA (arXiv 2405.04434, section 2.1): keys and values from one low-rank latent, positions in a shared key."""

    def __init__(self, config):
        super().__init__()
        heads, hidden, query = config.num_heads, config.hidden_size, config.num_heads * config.qk_head_dim
        self.num_heads, self.nope, self.rope = heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim, self.latent = config.v_head_dim, config.kv_lora_rank
        if config.q_lora_rank is None:
            self.q_proj = Linear(config, hidden, query, "column_parallel", "q_proj")
        else:
            self.q_a_proj = Linear(config, hidden, config.q_lora_rank, "latent", "q_a_proj")
            self.q_a_layernorm = RMSNorm(config, config.q_lora_rank, "latent_norm", LATENT_EPS)
            self.q_b_proj = Linear(config, config.q_lora_rank, query, "column_parallel", "q_b_proj")
        self.has_q_lora = config.q_lora_rank is not None
        self.kv_a_proj_with_mqa = Linear(config, hidden, self.latent + self.rope, "latent", "kv_a_proj_with_mqa")
        self.kv_a_layernorm = RMSNorm(config, self.latent, "latent_norm", LATENT_EPS)
        self.kv_b_proj = Linear(
            config, self.latent, heads * (self.nope + self.value_dim), "column_parallel", "kv_b_proj"
        )
        self.o_proj = Linear(config, heads * self.value_dim, hidden, "row_parallel", "o_proj")
        self.query_rotary = RotaryEmbedding(config, "query_rotary")
        self.key_rotary = RotaryEmbedding(config, "key_rotary")
        packed = partial(packed_locally, config=config)
        self.core_attention = core_attention(config, softmax_scale(config), sequence_part(config), packed)
        shard(self.core_attention, "core_attention", config)
        self.track = LargestLogits(config) if config.track_max_attention_logit else None
        self.attention_at_once = latent_attention(config, softmax_scale(config))
        self.split_kv_a = split_columns(self.latent)
        self.split_query, self.split_kv = split_columns(self.nope), split_columns(self.nope)
        shard(self.split_kv_a, "split_tokens", config)
        shard(self.split_query, "split_heads", config)
        shard(self.split_kv, "split_heads", config)
        self.to_heads, self.from_heads = ops.Transpose(), ops.Transpose()
        self.share_key = ops.Tile()
        self.cat_query, self.cat_key = ops.Concat(-1), ops.Concat(-1)
        shard(self, "latent_attention", config)

    def construct(self, x, seq, mask, position_ids=None):
        """x (T, H) of sequences of `seq` tokens; mask from `score_mask`."""
        query, kv, k_pe = self.project(x, self.query_latent(x))
        if self.attention_at_once is not None:
            cos, sin = self.query_rotary.tables(seq, position_ids)
            return self.o_proj(self._attend(self.attention_at_once, query, kv, k_pe, cos, sin, mask))
        query, key, value = self.by_heads(query, kv, k_pe, seq, position_ids)
        return self.output(self._attend(self.core_attention, query, key, value, mask))

    def query_latent(self, x):
        """What queries are made of: (T, q_lora_rank), or x itself without that rank."""
        return self.q_a_layernorm(self.q_a_proj(x)) if self.has_q_lora else x

    def project(self, x, query_latent):
        """Queries (T, N*D), keys and values of all heads (T, N*(nope + Dv)), the shared key (T, rope)."""
        query = self.q_b_proj(query_latent) if self.has_q_lora else self.q_proj(x)
        compressed_kv, k_pe = self.split_kv_a(self.kv_a_proj_with_mqa(x))  # (T, latent), (T, rope)
        return query, self.kv_b_proj(self.kv_a_layernorm(compressed_kv)), k_pe

    def by_heads(self, query, kv, k_pe, seq, position_ids):
        """Query, key (B, N, S, nope + rope) and value (B, N, S, Dv) with their positions."""
        q_nope, q_pe = self.split_query(self._heads(query, seq))  # (B, N, S, nope), (B, N, S, rope)
        k_nope, value = self.split_kv(self._heads(kv, seq))  # (B, N, S, nope), (B, N, S, Dv)
        q_pe = self.query_rotary(q_pe, position_ids)
        k_pe = self.key_rotary(k_pe.reshape((-1, 1, seq, self.rope)), position_ids)  # one head, shared
        query = self.cat_query((q_nope, q_pe))  # (B, N, S, nope + rope)
        key = self.cat_key((k_nope, self.share_key(k_pe, (1, self.num_heads, 1, 1))))
        return query, key, value

    def output(self, context):
        """(T, H) <- context (B, N, S, Dv)."""
        context = self.from_heads(context, (0, 2, 1, 3)).reshape((-1, self.num_heads * self.value_dim))
        return self.o_proj(context)

    def _attend(self, attention, *inputs):
        if self.track is None:
            return attention(*inputs)
        context, scores = attention.with_scores(*inputs)
        return ops.depend(context, self.track(scores))

    def _heads(self, x, seq):
        """(B, N, S, D) <- (T, N*D)."""
        return self.to_heads(x.reshape((-1, seq, self.num_heads, x.shape[-1] // self.num_heads)), (0, 2, 1, 3))


class FeedForward(nn.Cell):
    """SwiGLU: down(silu(gate(x)) * up(x)); the dense FFN (`place` mlp) and the shared experts (shared_experts).

    `split` is what model parallelism splits: the width, or the tokens.
    """

    def __init__(self, config, width: int, place: str = "mlp", split: str = "width"):
        super().__init__()
        widen, narrow = ("column_parallel", "row_parallel") if split == "width" else ("latent", "latent")
        self.gate_proj = Linear(config, config.hidden_size, width, widen, f"{place}.gate_proj")
        self.up_proj = Linear(config, config.hidden_size, width, widen, f"{place}.up_proj")
        self.down_proj = Linear(config, width, config.hidden_size, narrow, f"{place}.down_proj")
        self.swiglu = swiglu(config)
        shard(self.swiglu, f"feed_forward_{split}", config)
        adapted = any(config.lora.has(f"{place}.{name}_proj") for name in ("gate", "up", "down"))
        self.at_once = None if adapted else feed_forward(config)

    def construct(self, x):
        if self.at_once is not None:
            dtype = self.gate_proj.compute_dtype
            gate, up = ops.cast(self.gate_proj.weight, dtype), ops.cast(self.up_proj.weight, dtype)
            y = self.at_once(ops.cast(x, dtype), gate, up, ops.cast(self.down_proj.weight, dtype))
            return ops.cast(y, self.down_proj.out_type)
        return self.down_proj(self.swiglu(self.gate_proj(x), self.up_proj(x)))


class Experts(nn.Cell):
    """Weights of all routed experts: gate and up side by side (E, H, 2F), down (E, F, H)."""

    def __init__(self, config):
        super().__init__()
        moe, dtype = config.moe_config, getattr(mstype, config.param_init_type)
        init = Normal(config.initializer_range)
        experts, hidden, width = moe.expert_num, config.hidden_size, moe.moe_intermediate_size
        self.gate_up_proj = Parameter(initializer(init, (experts, hidden, 2 * width), dtype), name="gate_up_proj")
        self.down_proj = Parameter(initializer(init, (experts, width, hidden), dtype), name="down_proj")
        self.compute_dtype = getattr(mstype, config.compute_dtype)
        self.adapted = config.lora.adapts_experts()
        if self.adapted:
            self.lora = ExpertAdapters(config)

    def construct(self):
        """Both in the compute dtype, LoRA's adapters added."""
        gate_up, down = ops.cast(self.gate_up_proj, self.compute_dtype), ops.cast(self.down_proj, self.compute_dtype)
        return self.lora(gate_up, down) if self.adapted else (gate_up, down)


class MixtureOfExperts(nn.Cell):
    """DeepSeekMoE (arXiv 2412.19437, section 2.1.2): shared experts plus K routed ones per token.

    Routing, dispatch and the experts are one per-device program (`_local`), which the compiler sees as one operator
    with the layouts of sharding.py; load counts and balance losses are global sums over its outputs.
    """

    def __init__(self, config):
        super().__init__()
        moe = config.moe_config
        self.gate = TopkRouterV2(config)
        self.experts = Experts(config)
        self.has_shared = moe.shared_expert_num > 0
        if self.has_shared:
            width = moe.shared_expert_num * moe.moe_intermediate_size
            self.shared_experts = FeedForward(config, width, "shared_experts", moe.shared_expert_split)
            self.add_shared = ops.Add()
        self.dispatch = expert_dispatch(config, expert_group(config))
        self.balance = BalanceLoss(config)
        self.counts_unbiased = self.balance.active and self.gate.has_bias
        self.compute_dtype, self.out_type = getattr(mstype, config.compute_dtype), activation_type(config)
        self.bounds_rows = moe.use_gmm and moe.dropless_rows == "bounded"
        plan = experts_plan(5 + self.bounds_rows)
        self.local = run_locally(self._local, self._local_shapes, self._local_types, plan, config)
        self.count_mul, self.count = ops.Mul(), ops.ReduceSum()
        self.add_load = ops.AssignAdd().recompute(False)  # a recomputed forward must not count again
        self.count_dropped, self.add_dropped = ops.ReduceSum(), ops.AssignAdd().recompute(False)
        shard(self, "mixture_of_experts", config)

    def construct(self, x, token_mask, batch):
        """x (T, H), token_mask (T, 1) float32 (0 on padding) -> y (T, H) and this layer's balance loss, (1,)."""
        gate_up, down = self.experts()
        found = self.local(x, self.gate.weight, self.gate.bias(), gate_up, down)
        y, chosen, counted, scores, logits = found[:5]
        loss = no_loss()
        if self.training:
            self.add_load(self.gate.expert_load, self.count(self.count_mul(ops.stop_gradient(chosen), token_mask), 0))
            if self.bounds_rows:
                self.add_dropped(self.gate.dropped_choices, self.count_dropped(ops.stop_gradient(found[5]), 0))
            loss = self.balance(scores, logits, counted, token_mask, batch)
        if self.has_shared:
            y = self.add_shared(y, self.shared_experts(x))
        return y, loss

    def _local(self, x, gate_weight, bias, gate_up, down):
        """(y (T, H); chosen, counted, scores, logits (T, E)) of this device's tokens; with a bound dropped (T, 1).

        `chosen` is where tokens went; `counted` is what the balance loss counts: V3 ignores bias and groups (eq. 18).
        """
        topk_weights, topk_ids, scores, logits, chosen, unbiased = self.gate.route_and_count(x, gate_weight, bias)
        counted = unbiased if self.counts_unbiased else chosen
        inputs = ops.cast(x, self.compute_dtype), topk_weights, topk_ids, gate_up, down
        if self.bounds_rows:
            y, dropped = self.dispatch.run_and_count(*inputs)
            return ops.cast(y, self.out_type), chosen, counted, scores, logits, dropped
        return ops.cast(self.dispatch.run(*inputs), self.out_type), chosen, counted, scores, logits

    def _local_shapes(self, x, gate_weight, *_):
        per_expert = [x[0], gate_weight[0]]
        shapes = x, per_expert, per_expert, per_expert, per_expert
        return (*shapes, [x[0], 1]) if self.bounds_rows else shapes

    def _local_types(self, *_):
        return (self.out_type,) + (mstype.float32,) * (4 + self.bounds_rows)


class DecoderLayer(nn.Cell):
    """x + attention(norm(x)), then x + ffn(norm(x)); the FFN is dense or a mixture of experts."""

    attention = MultiHeadLatentAttention

    def __init__(self, config, is_moe: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(config, config.hidden_size, "token_norm")
        self.self_attn = self.attention(config)
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, "token_norm")
        self.is_moe = is_moe
        self.mlp = MixtureOfExperts(config) if is_moe else FeedForward(config, config.intermediate_size)
        self.add_attention, self.add_mlp = ops.Add(), ops.Add()
        shard(self, "decoder_layer", config)

    def construct(self, x, mask, token_mask, batch, position_ids=None):
        """x (T, H) of `batch` sequences -> x (T, H) and the layer's balance loss."""
        x = self.add_attention(x, self.self_attn(self.input_layernorm(x), x.shape[0] // batch, mask, position_ids))
        return self.feed_forward(x, token_mask, batch)

    def feed_forward(self, x, token_mask, batch):
        """The second half."""
        y = self.post_attention_layernorm(x)
        if self.is_moe:
            y, loss = self.mlp(y, token_mask, batch)
            return self.add_mlp(x, y), loss
        return self.add_mlp(x, self.mlp(y)), no_loss()


class DeepseekV2Model(nn.Cell):
    """Token ids to hidden states: embedding, decoder layers, final norm."""

    def __init__(self, config, decoder_layer):
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.layers = nn.CellList([decoder_layer(config, config.is_moe_layer(i)) for i in range(config.num_layers)])
        self.norm = RMSNorm(config, config.hidden_size, "token_norm")
        for i, layer in enumerate(self.layers):
            place(layer, i, config)
        put(self.embed_tokens, config.placed().first)
        put(self.norm, config.placed().last)

    def construct(self, ids, mask, token_mask, batch, position_ids=None):
        """ids (T,) -> hidden states after the final norm (T, H), and the sum of the balance losses."""
        x = self.embed_tokens(ids)
        balance = no_loss()
        for layer in self.layers:
            x, loss = layer(x, mask, token_mask, batch, position_ids)
            balance = balance + loss
        return self.norm(x), balance


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class DeepseekV2ForCausalLM(TrainingInterface, PreTrainedModel):
    """A DeepSeek-V2 language model and its training loss.

    Args:
        config: DeepseekV2Config.
    """

    config_class = DeepseekV2Config
    base_model_prefix = "model"
    decoder_layer = DecoderLayer
    parts_reported = 4  # main, MTP and balance loss, and how many there were

    @share_graph
    def __init__(self, config):
        super().__init__(config)
        self.ignore_token_id, self.pad_token_id = config.ignore_token_id, config.pad_token_id
        self.sliced_inputs = config.input_sliced_sig
        self.score_mask = score_mask(config)
        self.model = DeepseekV2Model(config, self.decoder_layer)
        self.lm_head = Linear(config, config.hidden_size, config.vocab_size, "lm_head")
        put(self.lm_head, config.placed().last)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.mean_loss, self.head_loss = MeanLoss(config), head_loss(config)
        self.loss_parts = Parameter(
            Tensor(np.zeros(self.parts_reported), mstype.float32),
            name="loss_parts",
            requires_grad=False,
            parallel_optimizer=False,
        )
        self.add_loss_parts = ops.AssignAdd()
        shard(self, "causal_lm", config)
        unit = np.eye(self.parts_reported, dtype=np.float32)
        self.is_main, self.is_mtp, self.is_balance, self.is_count = (Tensor(row) for row in unit[:4])
        if config.lora.lora_rank:
            freeze_base(self)
        if config.checkpoint_name_or_path:
            self.load_checkpoint(config)

    def construct(
        self, input_ids, labels=None, loss_mask=None, position_ids=None, attention_mask=None, actual_seq_len=None
    ):
        """Loss of a batch, or logits when there are no labels.

        Args:
            input_ids: (B, S) int32; with `input_sliced_sig: False` (B, S+1), from which labels are cut.
            labels: (B, S) int32, the next token at each position; `ignore_token_id` where there is none.
            loss_mask: (B, S) float32, 1 where the prediction counts; default: where labels are not ignored.
            position_ids: (B, S) int32; default 0..S-1.
            attention_mask: (B, 1, S, S), 1 where a key may NOT be attended; default causal.
            actual_seq_len: (B, L) int32, instead of a mask: where the documents of a sample end, which do not see each
                other; filled up with S. MindFormers counts on over the samples of a micro-batch; both are understood.

        Returns:
            () float32 loss (training: main + MTP + balance, evaluation: main), or (B, S, V) float32 logits.
        """
        if not self.sliced_inputs and labels is None:
            input_ids, labels = input_ids[:, :-1], input_ids[:, 1:]
        batch, seq = input_ids.shape
        ends = None if actual_seq_len is None else actual_seq_len - (actual_seq_len - 1) // seq * seq
        mask = self.score_mask(seq, attention_mask, ends)
        ids = input_ids.reshape((-1,))
        if labels is None:
            token_mask = ops.ones((batch * seq, 1), mstype.float32)
            hidden, _ = self.model(ids, mask, token_mask, batch, position_ids)
            return ops.cast(self.lm_head(hidden), mstype.float32).reshape((batch, seq, -1))
        if loss_mask is None:
            loss_mask = labels != self.ignore_token_id
        loss_mask = ops.cast(loss_mask, mstype.float32)
        token_mask = self._token_mask(input_ids, labels)
        hidden, balance = self.model(ids, mask, token_mask, batch, position_ids)
        main = self.token_loss(hidden, labels, loss_mask)
        if not self.training:
            return main.reshape(())
        mtp, mtp_balance = self.mtp_loss(hidden, labels, loss_mask, mask, token_mask, position_ids, ends)
        loss, parts = self.add_up(main, mtp, balance + mtp_balance)
        self.add_loss_parts(self.loss_parts, ops.stop_gradient(parts))
        return loss.reshape(())

    def add_up(self, main, mtp, of_layers):
        """The training loss (1,) and its parts; `of_layers` is what the layers return beside x, summed."""
        parts = main * self.is_main + mtp * self.is_mtp + of_layers * self.is_balance + self.is_count
        return main + mtp * self.mtp_factor() + of_layers, parts

    def mtp_factor(self) -> float:
        """What the MTP loss is multiplied with."""
        return 0.0

    def mtp_loss(self, hidden, labels, loss_mask, mask, token_mask, position_ids, ends):
        """Loss of multi-token prediction and its layers' balance loss, (1,) each: none in V2."""
        return no_loss(), no_loss()

    def token_loss(self, hidden, labels, loss_mask):
        """Mean cross entropy over the positions of loss_mask: (1,) <- hidden (T, H), labels and loss_mask (B, S)."""
        labels = ops.maximum(labels.reshape((-1,)), 0)  # ignored labels are negative; the mask leaves them out
        loss_mask = loss_mask.reshape((-1,))
        if self.training and self.head_loss is not None:
            head, dtype = self.lm_head.weight, self.lm_head.compute_dtype
            return self.head_loss(ops.cast(hidden, dtype), ops.cast(head, dtype), labels, loss_mask)
        return self.mean_loss(self.lm_head(hidden), labels, loss_mask)

    def _token_mask(self, input_ids, labels):
        """0 on padding, (T, 1): a pad token that is followed by another or by nothing (pad is also end of text)."""
        last = ops.logical_or(labels == self.pad_token_id, labels == self.ignore_token_id)
        padding = ops.logical_and(input_ids == self.pad_token_id, last)
        return ops.cast(ops.logical_not(padding), mstype.float32).reshape((-1, 1))
