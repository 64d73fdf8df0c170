"""config.json of released models on V3's skeleton, without what changes no number, and the same models in small."""

MOONLIGHT = {  # moonshotai/Moonlight-16B-A3B
    **{"model_type": "deepseek_v3", "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264},
    **{"moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16},
    **{"n_shared_experts": 2, "n_routed_experts": 64, "num_experts_per_tok": 6, "routed_scaling_factor": 2.446},
    **{"kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128},
    **{"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True},
    **{"first_k_dense_replace": 1, "rope_theta": 50000.0, "rope_scaling": None, "max_position_embeddings": 8192},
    **{"rms_norm_eps": 1e-5, "bos_token_id": 163584, "eos_token_id": 163586, "num_nextn_predict_layers": 0},
}
KIMI = {  # moonshotai/Kimi-K2-Instruct
    **MOONLIGHT,
    **{"model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048},
    **{"num_hidden_layers": 61, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536},
    **{"n_shared_experts": 1, "n_routed_experts": 384, "num_experts_per_tok": 8, "routed_scaling_factor": 2.827},
    **{"rms_norm_eps": 1e-6, "max_position_embeddings": 131072},
    "rope_scaling": {
        **{"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "original_max_position_embeddings": 4096,
    },
    "quantization_config": {
        **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    },
}
GLM = {  # zai-org/GLM-4.7-Flash
    **{"model_type": "glm4_moe_lite", "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240},
    **{"moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20},
    **{"n_shared_experts": 1, "n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8},
    **{"kv_lora_rank": 512, "q_lora_rank": 768, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256},
    **{"mlp_layer_types": ["dense"] + ["sparse"] * 46, "rms_norm_eps": 1e-5, "eos_token_id": [154820, 154827]},
    **{"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "num_nextn_predict_layers": 1},
}
YOUTU = {  # tencent/Youtu-LLM-2B
    **{"model_type": "youtu", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144},
    **{"num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512},
    **{"q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "rms_norm_eps": 1e-6},
    **{"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "embedding_initializer_range": 0.04},
}
KIMI_0905 = KIMI | {"max_position_embeddings": 262144, "rope_scaling": KIMI["rope_scaling"] | {"factor": 64.0}}
V3_1 = {  # deepseek-ai/DeepSeek-V3.1; R1 is the same but for scale_fmt
    **KIMI,
    **{"model_type": "deepseek_v3", "vocab_size": 129280, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"n_routed_experts": 256, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "rope_theta": 10000},
    **{"first_k_dense_replace": 3, "bos_token_id": 0, "eos_token_id": 1, "num_nextn_predict_layers": 1},
    "max_position_embeddings": 163840,
    "rope_scaling": KIMI["rope_scaling"] | {"factor": 40.0, "beta_fast": 32.0},
    "quantization_config": KIMI["quantization_config"] | {"scale_fmt": "ue8m0"},
}


def small(config: dict) -> dict:
    """The same with few layers, narrow; experts, choices and the form of positions are the model's."""
    sizes = dict(vocab_size=160, hidden_size=64, intermediate_size=96, moe_intermediate_size=8)
    sizes |= dict(num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, num_key_value_heads=4)
    sizes |= dict(kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    sizes |= dict(bos_token_id=0, eos_token_id=1, max_position_embeddings=512)
    rank = None if config["q_lora_rank"] is None else 32
    rope = config["rope_scaling"]
    short = rope and rope | {"original_max_position_embeddings": 8}  # tests are longer than that
    return config | sizes | {"q_lora_rank": rank, "rope_scaling": short, "torch_dtype": "float32"}
