"""Build transformers' DeepSeek models with our configuration and our weights."""

import numpy as np
import torch
from mindspore import Tensor
from transformers import DeepseekV2Config as HfV2Config
from transformers import DeepseekV2ForCausalLM as HfV2
from transformers import DeepseekV3Config as HfV3Config
from transformers import DeepseekV3ForCausalLM as HfV3
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from weights import from_huggingface, name_table, to_huggingface


def hf_model(config) -> torch.nn.Module:
    """transformers' model of our configuration (MTP left out), float32, random weights of std 0.05."""
    moe = config.moe_config
    common = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=moe.moe_intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        n_shared_experts=moe.shared_expert_num,
        n_routed_experts=moe.expert_num,
        num_experts_per_tok=moe.num_experts_chosen,
        routed_scaling_factor=moe.routed_scaling_factor,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=config.q_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        n_group=moe.n_group,
        topk_group=moe.topk_group,
        norm_topk_prob=moe.norm_topk_prob,
        first_k_dense_replace=moe.first_k_dense_replace if moe.expert_num > 1 else config.num_layers,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.theta,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_scaling=config.yarn and {"rope_type": "yarn", **vars(config.yarn)},
        pad_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    if config.model_type == "deepseekv2":
        model = HfV2(HfV2Config(topk_method=moe.topk_method, **common))
    else:
        model = HfV3(HfV3Config(**common))
        for router in (m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)):
            mask_with_minus_infinity(router)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.float().train()


def mask_with_minus_infinity(router: DeepseekV3TopkRouter) -> None:
    """Mend transformers 4.57: losing groups are masked with 0, which wins over negative scores (facts 2).

    Only the fill value of its one masked_fill changes; DeepSeek's own inference/model.py fills -inf.
    """
    original = router.get_topk_indices

    def get_topk_indices(scores):
        fill = torch.Tensor.masked_fill
        torch.Tensor.masked_fill = lambda self, mask, _: fill(self, mask, float("-inf"))
        try:
            return original(scores)
        finally:
            torch.Tensor.masked_fill = fill

    router.get_topk_indices = get_topk_indices


def hf_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and router biases by name."""
    tensors = dict(model.named_parameters())
    tensors.update({name: b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")})
    return tensors


def load_from_hf(network, config, model: torch.nn.Module) -> None:
    """Copy the reference's weights into our network through the name table; MTP keeps its own."""
    tensors = hf_tensors(model)
    parameters = network.parameters_dict()
    for entry in name_table(config):
        if entry.ours.startswith("mtp."):
            continue
        value = from_huggingface(entry, lambda name: tensors[name].detach().numpy())
        assert parameters[entry.ours].shape == value.shape, entry.ours
        parameters[entry.ours].set_data(Tensor(value))


def gradients_as_hf(config, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our gradients under HuggingFace's names and in its layout."""
    result = {}
    for entry in name_table(config):
        if entry.ours in gradients:
            result.update({n: g for n, g in to_huggingface(entry, gradients[entry.ours]).items() if n in entry.theirs})
    return result
