"""DeepSeek-V3.2's attention in torch, written from the report (DeepSeek-V3.2-Exp, section 2.1), in transformers' V3."""

import torch
from helpers.hf_reference import hf_model
from transformers.models.deepseek_v3 import modeling_deepseek_v3


class Indexer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.rope = config.index_n_heads, config.qk_rope_head_dim
        self.wq_b = torch.nn.Linear(config.q_lora_rank, self.heads * config.index_head_dim, bias=False)
        self.wk = torch.nn.Linear(config.hidden_size, config.index_head_dim, bias=False)
        self.k_norm = torch.nn.LayerNorm(config.index_head_dim, eps=1e-6)
        self.weights_proj = torch.nn.Linear(config.hidden_size, self.heads, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:  # so large that scores are far from equal
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x, latent, cos, sin):
        """(B, S, S), one query and one head after another."""
        query = self.turn(self.wq_b(latent).unflatten(-1, (self.heads, -1)), cos.unsqueeze(2), sin.unsqueeze(2))
        key, weights = self.turn(self.k_norm(self.wk(x)), cos, sin), self.weights_proj(x)
        scores = torch.zeros(*x.shape[:2], x.shape[1])
        for head in range(self.heads):
            products = query[:, :, head] @ key.transpose(1, 2) / query.shape[-1] ** 0.5
            scores = scores + weights[:, :, head, None] / self.heads**0.5 * products.clamp(min=0)
        return scores

    def turn(self, x, cos, sin):
        a, b, rest = x.split([self.rope // 2, self.rope // 2, x.shape[-1] - self.rope], -1)
        cos, sin = cos[..., : self.rope // 2], sin[..., : self.rope // 2]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def v32_model(config, monkeypatch) -> torch.nn.Module:
    """transformers' V3 of our V3.2 configuration with indexers; each keeps its `loss` of the last forward."""
    model = hf_model(config)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.indexer = Indexer(config)
        attention.register_forward_pre_hook(keep_inputs, with_kwargs=True)
        attention.q_a_layernorm.register_forward_hook(lambda norm, _, y, attention=attention: keep(attention, y))

    def attend(module, query, key, value, attention_mask, scaling, **_):
        length = query.shape[2]
        visible = torch.ones(length, length, dtype=torch.bool).tril().expand(query.shape[0], -1, -1)
        scores = module.indexer(module.seen_x.detach(), module.seen_latent.detach(), *module.seen_positions)
        if config.sparse_attention == "sparse" and length > config.index_topk:
            places = scores.masked_fill(~visible, float("-inf")).topk(config.index_topk, -1).indices
            visible = visible & torch.zeros_like(visible).scatter(-1, places, True)
        hidden = ~visible
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(hidden.unsqueeze(1), float("-inf")).softmax(-1)
        target = weights.detach().sum(1)
        target = target / target.sum(-1, keepdim=True)
        learnt = scores.masked_fill(hidden, float("-inf")).log_softmax(-1)
        terms = target * (target.log() - learnt)
        module.loss = terms.masked_fill(hidden, 0.0).nan_to_num().sum(-1).mean()
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setattr(modeling_deepseek_v3, "eager_attention_forward", attend)
    return model


def keep_inputs(attention, inputs, named):
    attention.seen_x = named["hidden_states"] if "hidden_states" in named else inputs[0]
    attention.seen_positions = named["position_embeddings"]


def keep(attention, latent):
    attention.seen_latent = latent


def indexer_loss(model) -> torch.Tensor:
    """The sum over layers."""
    return sum(layer.self_attn.loss for layer in model.model.layers)
