"""HuggingFace folders of random weights, written by the safetensors package and by loops of their own."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

BLOCK = 128
V3_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "kv_lora_rank": 24,
    "max_position_embeddings": 320,
    "moe_intermediate_size": 20,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 8,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 12,
    "vocab_size": 128,
}
V2_LITE_CONFIG = {
    **{k: v for k, v in V3_CONFIG.items() if k not in ("num_nextn_predict_layers", "quantization_config")},
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "rope_scaling": {**V3_CONFIG["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, spelled out independently of weights.py."""
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    head = (config["vocab_size"], hidden)
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = head
    layers = config["num_hidden_layers"]
    for i in range(layers + config.get("num_nextn_predict_layers", 0)):
        layer = f"model.layers.{i}"
        attention = {"kv_a_proj_with_mqa": (latent + rope, hidden), "kv_a_layernorm": (latent,)}
        attention |= {"kv_b_proj": (heads * (nope + value), latent), "o_proj": (hidden, heads * value)}
        rank = config["q_lora_rank"]
        if rank is None:
            attention["q_proj"] = (heads * (nope + rope), hidden)
        else:
            attention |= {
                "q_a_proj": (rank, hidden),
                "q_a_layernorm": (rank,),
                "q_b_proj": (heads * (nope + rope), rank),
            }
        found |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        ffns = {"mlp": config["intermediate_size"]}
        if i >= config["first_k_dense_replace"]:
            width = config["moe_intermediate_size"]
            ffns = {f"mlp.experts.{e}": width for e in range(config["n_routed_experts"])}
            ffns["mlp.shared_experts"] = width * config["n_shared_experts"]
            found[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            if config["topk_method"] == "noaux_tc":
                found[f"{layer}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for ffn, width in ffns.items():
            found |= {f"{layer}.{ffn}.{part}_proj.weight": (width, hidden) for part in ("gate", "up")}
            found[f"{layer}.{ffn}.down_proj.weight"] = (hidden, width)
        if i >= layers:
            found |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
            found[f"{layer}.eh_proj.weight"] = (hidden, 2 * hidden)
            found[f"{layer}.embed_tokens.weight"] = found[f"{layer}.shared_head.head.weight"] = head
    return found


def random_tensors(config: dict, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights; the router's biases float32; the MTP layer's embedding and head equal the model's."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        kind = torch.float32 if name.endswith("e_score_correction_bias") else dtype
        values = torch.randn(shape, generator=generator) * 0.05
        tensors[name] = (values + 1 if name.endswith("norm.weight") else values).to(kind)
    for name in tensors:
        if name.endswith(".embed_tokens.weight") and ".layers." in name:
            tensors[name] = tensors["model.embed_tokens.weight"].clone()
        if name.endswith("shared_head.head.weight"):
            tensors[name] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).clone()
    return tensors


def write_folder(folder: Path, config: dict, tensors: dict[str, torch.Tensor], files: int = 3) -> Path:
    """config.json, an index and `files` files, tensors spread over them in an order of no meaning."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors, key=lambda name: name[::-1])
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:06d}.safetensors"
        save_file({name: tensors[name] for name in names[i::files]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """FP8 blocks of 128 x 128, their inverse scales, and the float32 values that they stand for, block by block."""
    rows, columns = weight.shape
    quantised = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    meant = np.empty(weight.shape, np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            block = weight[part].float()
            scales[i, j] = block.abs().max() / 448
            quantised[part] = (block / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = (quantised[part].float() * scales[i, j]).numpy()
    return quantised, scales, meant
