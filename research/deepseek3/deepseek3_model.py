"""DeepSeek-V3: V2's layers with V3's router, and multi-token prediction (arXiv 2412.19437, section 2.2).

Legend as in deepseek2_model.py.
"""

import numpy as np
from balance_loss import no_loss
from deepseek2_model import DeepseekV2ForCausalLM, Linear, RMSNorm
from deepseek3_config import DeepseekV3Config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from sharding import documents_locally, place, put, shard, share_graph

from mindformers_ext.layers.fused_ops import documents_before

__all__ = ["DeepseekV3ForCausalLM"]


class SameDocument(nn.Cell):
    """1 where the token that depth `depth` predicts is of the position's own document, else 0.

    (B, S) float32 <- ends of documents (B, L). Of the token after the sequence the last one's document counts.
    """

    def __init__(self, seq: int, depth: int):
        super().__init__()
        place = np.arange(seq, dtype=np.int32)
        self.place, self.predicted = Tensor(place), Tensor(np.minimum(place + depth + 1, seq - 1))

    def construct(self, ends):
        own, other = documents_before(ends, self.place), documents_before(ends, self.predicted)
        return ops.cast(own == other, mstype.float32)


class MultiTokenPredictor(nn.Cell):
    """Hidden states that predict one token further (facts 10).

    eh_proj takes [enorm(embedding) ; hnorm(hidden)], in the order of the released weights. The hidden states of depth 1
    come from after the main model's final norm, as serving stacks (vLLM) feed them, those of a further depth likewise
    from after the norm of the depth before it (as in megatron-core 0.16): each depth begins with what the head sees.

    Args:
        index: of its decoder layer, counted on from the main model's.
        decoder_layer: class of that layer.
    """

    def __init__(self, config, index: int, decoder_layer):
        super().__init__()
        self.enorm = RMSNorm(config, config.hidden_size, "token_norm")
        self.hnorm = RMSNorm(config, config.hidden_size, "token_norm")
        self.eh_proj = Linear(config, 2 * config.hidden_size, config.hidden_size, "latent")
        self.layer = decoder_layer(config, config.is_moe_layer(index))
        self.shared_head_norm = RMSNorm(config, config.hidden_size, "token_norm")
        depth, seq = index - config.num_layers + 1, config.seq_length
        self.in_document = documents_locally(SameDocument(seq, depth), seq, config)
        self.cat = ops.Concat(-1)
        shard(self, "multi_token_predictor", config)

    def construct(self, hidden, embedding, mask, token_mask, batch, position_ids=None):
        """hidden (T, H), embedding (T, H) of the token after each -> (T, H) for the shared head, balance loss."""
        x = self.eh_proj(self.cat((self.enorm(embedding), self.hnorm(hidden))))
        x, balance = self.layer(x, mask, token_mask, batch, position_ids)
        return self.shared_head_norm(x), balance


class ShiftLeft(nn.Cell):
    """Each sequence `count` tokens on, `fill` at its end: (B, S) <- (B, S).

    Never call it on its own result: where a slice follows a concatenation, MindSpore 2.9's parallel compiler
    (MergeConcatSlice) takes one of the joined pieces instead and does not look at where the slice begins, so that in a
    pipeline the second shift did nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.rest, self.last = ops.StridedSlice(), ops.StridedSlice()
        self.cat = ops.Concat(1)
        shard(self, "shift_left", config)

    def construct(self, x, count, fill):
        batch, seq = x.shape
        rest = self.rest(x, (0, count), (batch, seq), (1, 1))
        last = self.last(x, (0, seq - count), (batch, seq), (1, 1))
        return self.cat((rest, ops.full_like(last, fill)))


@MindFormerRegister.register(MindFormerModuleType.MODELS)
class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """A DeepSeek-V3 language model and its training loss.

    Args:
        config: DeepseekV3Config.
    """

    config_class = DeepseekV3Config

    @share_graph
    def __init__(self, config):
        super().__init__(config)
        indices = range(config.num_layers, config.num_layers + config.mtp_depth)
        self.mtp = nn.CellList([MultiTokenPredictor(config, index, self.decoder_layer) for index in indices])
        self.depths = max(config.mtp_depth, 1)
        self.shift_left = ShiftLeft(config)
        self.factor = config.mtp_loss_factor
        if config.moves_mtp_factor:
            value = Tensor([self.factor], mstype.float32)
            self.factor = Parameter(value, name="mtp_loss_factor", requires_grad=False, parallel_optimizer=False)
        for index, predictor in zip(indices, self.mtp, strict=True):
            put(predictor, config.placed().last)
            place(predictor.layer, index, config)

    def mtp_factor(self) -> float | Parameter:
        """lambda (eq. 25); a parameter, (1,), where a recipe changes it."""
        return self.factor

    def mtp_loss(self, hidden, labels, loss_mask, mask, token_mask, position_ids, ends):
        """Mean over depths of the cross entropy, depth k of the token k after the next; the layers' balance loss.

        With the ends of documents, only tokens of the same document count.
        """
        loss, balance = no_loss(), no_loss()
        following, real = labels, ops.cast(token_mask.reshape(labels.shape), mstype.float32)
        for depth, predictor in enumerate(self.mtp, 1):
            embedding = self.model.embed_tokens(ops.maximum(following, 0).reshape((-1,)))
            hidden, extra = predictor(hidden, embedding, mask, token_mask, labels.shape[0], position_ids)
            following = self.shift_left(labels, depth, self.ignore_token_id)
            counts = self.shift_left(loss_mask, depth, 0)
            if ends is not None:
                counts = counts * ops.stop_gradient(predictor.in_document(ends))
            loss = loss + self.token_loss(hidden, following, counts)
            balance = balance + extra
            token_mask = self.token_mask_further(token_mask, real, depth)
        return loss / self.depths, balance

    def token_mask_further(self, token_mask, real, depth):
        """token_mask of the depth after `depth`: it has no token where the one it would look at is past the sequence.

        `real` (B, S) is the main model's token_mask.
        """
        return (token_mask.reshape(real.shape) * self.shift_left(real, depth, 0)).reshape((-1, 1))

    def decoder_layers(self) -> list[tuple[str, nn.Cell]]:
        """(name, layer) of every decoder layer, MTP's included, by depth."""
        return super().decoder_layers() + [(f"mtp.{i}", predictor.layer) for i, predictor in enumerate(self.mtp)]
