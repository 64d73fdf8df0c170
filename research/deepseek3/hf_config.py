"""HuggingFace's config.json to the YAML's model_config and moe_config, and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from deepseek2_config import DeepseekV2Config, YarnConfig
from deepseek3_config import DeepseekV3Config

from mindformers_ext.errors import ConfigError

__all__ = ["compare", "config_from_hf", "config_to_hf", "read_config", "sections_from_hf"]

# HuggingFace's word: ours, in model_config ...
MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "kv_lora_rank": "kv_lora_rank",
    "q_lora_rank": "q_lora_rank",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "v_head_dim": "v_head_dim",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "rope_theta": "theta",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}
# ... and in moe_config
MOE = {
    "n_routed_experts": "expert_num",
    "num_experts_per_tok": "num_experts_chosen",
    "n_shared_experts": "shared_expert_num",
    "moe_intermediate_size": "moe_intermediate_size",
    "first_k_dense_replace": "first_k_dense_replace",
    "topk_method": "topk_method",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor",
}
FAMILIES = {
    "deepseek_v2": ("DeepseekV2", {"topk_method": "greedy", "scoring_func": "softmax"}),
    "deepseek_v3": ("DeepseekV3", {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
}
# What the model always does; a config.json that says otherwise describes another model.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
SCORES = {"sigmoid": True, "softmax": False}
NOT_WEIGHTS = ("initializer_range", "bos_token_id", "eos_token_id")  # may differ from the YAML


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a HuggingFace folder.

    Raises:
        ConfigError: it is missing, is not JSON or is not of a DeepSeek V2 or V3 that this model can be.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    family = values.get("model_type") if isinstance(values, dict) else None
    if family not in FAMILIES:
        raise ConfigError(f"{path}: model_type is {family!r}, but must be one of {', '.join(FAMILIES)}")
    for key, value in FIXED.items():
        if values.get(key, value) != value:
            raise ConfigError(f"{path}: {key} is {values[key]!r}, but this model has {value!r} only")
    heads, shared = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if shared not in (None, heads):
        raise ConfigError(
            f"{path}: num_key_value_heads is {shared!r}, but MLA has one for each of the {heads} num_attention_heads"
        )
    if family == "deepseek_v2" and values.get("norm_topk_prob"):
        # modeling_deepseek.py beside DeepSeek's V2 weights: gates / sum, else gates * routed_scaling_factor.
        raise ConfigError(
            f"{path}: norm_topk_prob is {values['norm_topk_prob']!r}, but with it DeepSeek's own V2 code normalises "
            "the gates and does not scale them, and transformers' scales and does not normalise; set it to False"
        )
    return values


def sections_from_hf(values: dict[str, Any], where: str | Path = "config.json") -> dict[str, dict]:
    """The YAML sections `model` and `moe_config` of a config.json; the run adds what HuggingFace does not know.

    Raises:
        ConfigError: a size is missing, or positions are extended in another way than YaRN.
    """
    name, defaults = FAMILIES[values["model_type"]]
    values = {"tie_word_embeddings": False, **defaults, **values}
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # the second name is transformers 5's
    values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    module = name.replace("Deepseek", "deepseek").replace("V", "")  # deepseek3
    missing = [key for key in (*MODEL, *MOE) if key not in values and key not in NOT_WEIGHTS]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing; it is needed to build the model")
    model = {ours: values[theirs] for theirs, ours in MODEL.items() if values.get(theirs) is not None}
    model["q_lora_rank"] = values["q_lora_rank"]
    model["pad_token_id"] = model.get("eos_token_id", 1)
    model["mtp_depth"] = int(values.get("num_nextn_predict_layers") or 0)
    model |= positions_from_hf(rope, where)
    moe = {ours: values[theirs] for theirs, ours in MOE.items() if values[theirs] is not None}
    if values["scoring_func"] not in SCORES:
        raise ConfigError(f"{where}: scoring_func is {values['scoring_func']!r}, but must be sigmoid or softmax")
    moe["use_gating_sigmoid"] = SCORES[values["scoring_func"]]
    moe["use_gmm"] = True  # HuggingFace's models drop no token
    head = {"type": f"{name}Config", "auto_register": f"{module}_config.{name}Config"}
    arch = {"type": f"{name}ForCausalLM", "auto_register": f"{module}_model.{name}ForCausalLM"}
    return {"model": {"model_config": head | model, "arch": arch}, "moe_config": moe}


def positions_from_hf(rope: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """`extend_method` and `scaling_factor` of HuggingFace's `rope_scaling`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"extend_method": "None"}
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_scaling.type is {kind!r}, but this model extends positions with yarn only")
    known = [field.name for field in dataclasses.fields(YarnConfig)]
    given = {"mscale": 1.0, "mscale_all_dim": 0.0} | rope  # what HuggingFace assumes
    return {"extend_method": "YARN", "scaling_factor": {key: given[key] for key in known if key in given}}


def config_from_hf(values: dict[str, Any], mtp_depth: int, where: str | Path = "config.json") -> DeepseekV2Config:
    """The model's configuration object; `mtp_depth` is how many MTP layers the files hold."""
    sections = sections_from_hf(values, where)
    model = {k: v for k, v in sections["model"]["model_config"].items() if k not in ("type", "auto_register")}
    length = values.get("max_position_embeddings") or 4096
    cls = DeepseekV3Config if values["model_type"] == "deepseek_v3" else DeepseekV2Config
    try:
        return cls(
            **{**model, "mtp_depth": mtp_depth},
            seq_length=min(4096, length),
            max_position_embeddings=length,
            moe_config=sections["moe_config"],
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def config_to_hf(config: DeepseekV2Config, mtp_depth: int, dtype: str = "bfloat16") -> dict[str, Any]:
    """config.json of our configuration, as transformers and vLLM read it.

    topk_method and scoring_func are always written (vLLM finds the bias by them); num_nextn_predict_layers is the
    number of MTP layers that the files hold.
    """
    family = "deepseek_v2" if config.model_type == "deepseekv2" else "deepseek_v3"
    moe = config.moe_config
    values = {
        "architectures": [f"{FAMILIES[family][0]}ForCausalLM"],
        "model_type": family,
        **{theirs: getattr(config, ours) for theirs, ours in MODEL.items()},
        **{theirs: getattr(moe, ours) for theirs, ours in MOE.items()},
        **FIXED,
        "num_key_value_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "scoring_func": "sigmoid" if moe.use_gating_sigmoid else "softmax",
        "num_nextn_predict_layers": mtp_depth,
        "rope_scaling": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if moe.expert_num == 1:  # no layer has experts
        values["first_k_dense_replace"] = config.num_layers
    if config.yarn:
        values["rope_scaling"] = {"type": "yarn", **vars(config.yarn)}
    return values


def corrected(values: dict[str, Any], mtp_depth: int, dtype: str) -> dict[str, Any]:
    """A given config.json made true of exported files: no quantization, the MTP layers and the type they have."""
    name, defaults = FAMILIES[values["model_type"]]
    kept = {key: value for key, value in values.items() if key not in ("quantization_config", "auto_map", "dtype")}
    right = {
        "architectures": [f"{name}ForCausalLM"],
        "num_nextn_predict_layers": mtp_depth,
        "torch_dtype": dtype,
    }
    return {**defaults, **kept, **right}


def compare(config: DeepseekV2Config, values: dict[str, Any], where: str | Path) -> None:
    """Refuse a config.json that describes another model than `config`.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    other = config_from_hf(values, config.mtp_depth, where)
    pairs = [(theirs, config, other, ours, "model_config") for theirs, ours in MODEL.items()]
    if config.moe_config.expert_num > 1 or other.moe_config.expert_num > 1:
        pairs += [(theirs, config.moe_config, other.moe_config, ours, "moe_config") for theirs, ours in MOE.items()]
        pairs.append(("scoring_func", config.moe_config, other.moe_config, "use_gating_sigmoid", "moe_config"))
    for theirs, mine, read, ours, section in pairs:
        if theirs not in NOT_WEIGHTS and getattr(mine, ours) != getattr(read, ours):
            raise ConfigError(
                f"{where}: {theirs} is {values.get(theirs)!r}, but {section}.{ours} of the YAML is "
                f"{getattr(mine, ours)!r}; make the YAML's the same"
            )
    if config.yarn != other.yarn:
        raise ConfigError(
            f"{where}: rope_scaling is {values.get('rope_scaling')!r}, but the YAML has extend_method "
            f"{config.extend_method!r} with scaling_factor {config.scaling_factor!r}; make the YAML's the same"
        )
