"""HuggingFace's config.json to the YAML's model_config and moe_config, and back.

One reader knows the keys of DeepSeek V2's and V3's config.json: each is done as transformers 4.57 does it (5 for its
own spelling of positions), has no effect on the numbers, or is refused by name. hf_families.py brings other models on
the same skeleton to these words.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from deepseek2_config import DeepseekV2Config
from deepseek3_config import DeepseekV3Config
from deepseek32_config import DeepseekV32Config
from hf_families import FAMILIES, text_model
from msgspec import Meta

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.json_files import PositiveNumber, Whole, check_keys, read_object, short

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
# What the model always does; a config.json that says otherwise describes another model.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "partial_rotary_factor": 1.0,
}
WRITTEN_FIXED = (
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "moe_layer_freq",
    "rope_interleave",
)
SCORES = {"sigmoid": True, "softmax": False}
CLASSES = {"DeepseekV2": DeepseekV2Config, "DeepseekV3": DeepseekV3Config, "DeepseekV32": DeepseekV32Config}
NOT_WEIGHTS = ("initializer_range", "bos_token_id", "eos_token_id")  # may differ from the YAML
# What transformers (and DeepSeek's own code) assume where config.json does not say. Sizes have no default here:
# transformers would take another model's.
DEFAULTS = {"rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False}

Count = Annotated[int, Meta(ge=1, le=1000)]  # of layers: a larger one would fill the memory with names
Experts = Annotated[int, Meta(ge=1, le=10_000)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Base = Annotated[float, Meta(gt=1, le=1e15)]
Factor = Annotated[float, Meta(ge=1, le=1e9)]
NotNegative = Annotated[float, Meta(ge=0, le=1e9)]
# Type of every key that says what the model computes.
KEYS = {
    "model_type": str,
    "vocab_size": Size,
    "tie_word_embeddings": bool,
    "hidden_size": Size,
    "num_hidden_layers": Count,
    "num_attention_heads": Size,
    "num_key_value_heads": Size | None,
    "intermediate_size": Size,
    "kv_lora_rank": Size,
    "q_lora_rank": Size | None,
    "qk_rope_head_dim": Size,
    "qk_nope_head_dim": Size,
    "v_head_dim": Size,
    "head_dim": Size | None,
    "qk_head_dim": Size | None,
    "rms_norm_eps": Annotated[float, Meta(gt=0, le=1)],
    "initializer_range": NotNegative,
    "max_position_embeddings": Size | None,
    "rope_theta": Base,
    "rope_scaling": dict | None,
    "rope_parameters": dict | None,
    "n_routed_experts": Experts | None,
    "num_experts_per_tok": Experts | None,
    "n_shared_experts": Annotated[int, Meta(ge=0, le=10_000)] | None,
    "moe_intermediate_size": Size | None,
    "first_k_dense_replace": Whole,
    "topk_method": Literal["greedy", "group_limited_greedy", "noaux_tc"],
    "scoring_func": str,
    "n_group": Experts | None,
    "topk_group": Experts | None,
    "norm_topk_prob": bool,
    "routed_scaling_factor": Annotated[float, Meta(gt=0, le=1e9)],
    "num_nextn_predict_layers": Annotated[int, Meta(ge=0, le=1000)] | None,
    "bos_token_id": Whole | None,
    "eos_token_id": Whole | Annotated[list[Whole], Meta(min_length=1)] | None,  # of several, the first ends a document
    "pad_token_id": Whole | None,
    "quantization_config": dict | None,
    **{key: type(value) for key, value in FIXED.items()},
}
# Keys that change no number of a forward or backward pass of the weights that are read here: what the files are and
# were made with, what a program returns, how text is generated, and other programs' balance losses and parallelism.
NO_EFFECT = (
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    "use_bfloat16",
    "torchscript",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "tokenizer_class",
    "prefix",
    "sep_token_id",
    "unk_token_id",
    "task_specific_params",
    "finetuning_task",
    "problem_type",
    "id2label",
    "label2id",
    "num_labels",
    "tf_legacy_loss",
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "output_scores",
    "return_dict_in_generate",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "cross_attention_hidden_size",
    "tie_encoder_decoder",
    "chunk_size_feed_forward",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
    "pretraining_tp",
)
# Keys of every transformers model that would make it another one; the value that these have.
OFF = {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
# Keys of rope_scaling (of rope_parameters, transformers 5's name) for each type of positions.
ROPE = {
    "default": {"rope_theta": Base, "partial_rotary_factor": float},
    "yarn": {
        "rope_theta": Base,
        "partial_rotary_factor": float,
        "factor": Factor,
        "original_max_position_embeddings": Size,
        "beta_fast": PositiveNumber,
        "beta_slow": PositiveNumber,
        "mscale": NotNegative | None,
        "mscale_all_dim": NotNegative | None,
        "attention_factor": PositiveNumber | None,
        "truncate": bool,
    },
}
# quantization_config, as hf_weights.py reads it: FP8 in blocks, or experts of four bits in groups (compressed-tensors).
QUANTIZATION = {
    "fp8": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
        ("activation_scheme", "scale_fmt"),
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": None},
        ("config_groups", "ignore", "quantization_status", "global_compression_ratio", "version", "sparsity_config"),
    ),
}
QUANTIZATION_NO_EFFECT = ("modules_to_not_convert", "dequantize", "transform_config")
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "group_size": 32, "dynamic": False}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a HuggingFace folder, as it is written there; of its language model where there is more.

    Raises:
        ConfigError: it is missing, is not JSON or is not of a model that this one can be.
    """
    values = text_model(read_object(folder / "config.json"), folder / "config.json")
    typed(values, folder / "config.json")
    return values


def typed(values: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The known keys of a config.json, each of its type, with what is assumed for those that are left out.

    Raises:
        ConfigError: names the unknown keys, the values of another type, or what this model does otherwise.
    """
    values = text_model(values, where)
    family = FAMILIES[values["model_type"]]
    values = family.in_deepseek_words(values, where)
    known = check_keys(values, KEYS | dict.fromkeys(family.sizes, Size), (*NO_EFFECT, *OFF, *family.no_effect), where)
    found = {**family.defaults, **DEFAULTS, **known}
    for key, value in {**FIXED, **OFF}.items():
        if values.get(key, value) != value:
            raise ConfigError(f"{where}: {key} is {short(values[key])}, but this model has {value!r} only")
    missing = [key for key in (*MODEL, *MOE, *family.sizes) if key not in found and key not in NOT_WEIGHTS]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing; it is needed to build the model")
    heads, width = found["num_attention_heads"], found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    for key, value in (
        ("num_key_value_heads", heads),
        ("head_dim", found["qk_rope_head_dim"]),
        ("qk_head_dim", width),
    ):
        if found.get(key) not in (None, value):
            raise ConfigError(f"{where}: {key} is {found[key]}, but must be {value}, which follows from other keys")
    if isinstance(found.get("eos_token_id"), list):
        found["eos_token_id"] = found["eos_token_id"][0]
    if family.cls == "DeepseekV2" and found["norm_topk_prob"]:
        # modeling_deepseek.py beside DeepSeek's V2 weights: gates / sum, else gates * routed_scaling_factor.
        raise ConfigError(
            f"{where}: norm_topk_prob is True, but with it DeepSeek's own V2 code normalises the gates and does not "
            "scale them, and transformers' scales and does not normalise; set it to False"
        )
    if found["scoring_func"] not in SCORES:
        raise ConfigError(f"{where}: scoring_func is {found['scoring_func']!r}, but must be sigmoid or softmax")
    if found.get("quantization_config"):
        check_quantization(found["quantization_config"], where)
    return found


def check_quantization(values: dict[str, Any], where: str | Path) -> None:
    """Raise ConfigError unless weights are stored in a way that hf_weights.py reads."""
    method = values.get("quant_method")
    if not isinstance(method, str) or method not in QUANTIZATION:
        legal = " or ".join(map(repr, QUANTIZATION))
        raise ConfigError(f"{where}: quantization_config.quant_method is {short(method)}, but must be {legal}")
    right, others = QUANTIZATION[method]
    refuse_others(values, right, (*others, *QUANTIZATION_NO_EFFECT), where, "quantization_config.")
    groups = values.get("config_groups", {}) if method == "compressed-tensors" else {}
    for name, group in groups.items() if isinstance(groups, dict) else [("", groups)]:
        section = f"quantization_config.config_groups.{name}"
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ConfigError(f"{where}: {section} is {short(group)}, but must be a mapping with weights")
        no_effect = ("observer", "observer_kwargs", "block_structure", "scale_dtype", "zp_dtype")
        refuse_others(weights, INT4 | {"actorder": None}, no_effect, where, f"{section}.weights.")


def refuse_others(values: dict, right: dict, no_effect: tuple[str, ...], where: str | Path, section: str) -> None:
    """Raise ConfigError for a value that is not the right one, or a key that is unknown."""
    for key, value in values.items():
        if key in right and value != right[key]:
            raise ConfigError(f"{where}: {section}{key} is {short(value)}, but only {right[key]!r} is read")
        if key not in right and key not in no_effect:
            raise ConfigError(f"{where}: {section}{key} ({short(value)}) is an unknown key; correct or remove it")


def sections_from_hf(values: dict[str, Any], where: str | Path = "config.json") -> dict[str, dict]:
    """The YAML sections `model` and `moe_config` of a config.json; the run adds what HuggingFace does not know.

    Every key is written, also where config.json has null, so that none of a file underneath shines through.

    Raises:
        ConfigError: a key is unknown, missing or wrong, or positions are extended in another way than YaRN.
    """
    known = typed(values, where)
    family = FAMILIES[known["model_type"]]
    name = family.cls
    module = name.replace("Deepseek", "deepseek").replace("V", "")  # deepseek3
    positions, theta = positions_from_hf(known, values, where)
    known["rope_theta"] = theta
    model = {ours: known[theirs] for theirs, ours in MODEL.items() if known.get(theirs) is not None}
    model["q_lora_rank"] = known["q_lora_rank"]
    pad = known.get("pad_token_id")
    model["pad_token_id"] = model.get("eos_token_id", 1) if pad is None else pad
    model["mtp_depth"] = known.get("num_nextn_predict_layers") or 0
    model |= positions | {key: known[key] for key in family.sizes}
    absent = {"expert_num": 1, "num_experts_chosen": 1, "shared_expert_num": 0, "n_group": 1}
    moe = {ours: absent.get(ours) if known[theirs] is None else known[theirs] for theirs, ours in MOE.items()}
    moe["topk_group"] = moe["topk_group"] or moe["n_group"]
    if moe["moe_intermediate_size"] is None:
        if moe["expert_num"] > 1:
            raise ConfigError(f"{where}: moe_intermediate_size is null, but the model has experts; give their width")
        del moe["moe_intermediate_size"]
    moe["use_gating_sigmoid"] = SCORES[known["scoring_func"]]
    moe["use_gmm"] = True  # HuggingFace's models drop no token
    head = {"type": f"{name}Config", "auto_register": f"{module}_config.{name}Config"}
    arch = {"type": f"{name}ForCausalLM", "auto_register": f"{module}_model.{name}ForCausalLM"}
    return {"model": {"model_config": head | model, "arch": arch}, "moe_config": moe}


def positions_from_hf(known: dict[str, Any], values: dict[str, Any], where: str | Path) -> tuple[dict[str, Any], float]:
    """`extend_method` and `scaling_factor` of HuggingFace's rope_scaling or rope_parameters, and theta.

    Raises:
        ConfigError: names what this model does not do, or what transformers and DeepSeek's own code do differently.
    """
    name = "rope_scaling" if known.get("rope_scaling") is not None else "rope_parameters"
    rope = known.get(name)
    if rope is None:
        return {"extend_method": "None"}, known["rope_theta"]
    other = known.get("rope_parameters")
    if other not in (None, rope):
        raise ConfigError(f"{where}: rope_scaling is {short(rope)}, but rope_parameters {short(other)}; leave one out")
    kinds = {key: rope[key] for key in ("type", "rope_type") if rope.get(key) is not None}
    kind = next(iter(kinds.values()), None)
    if any(value != kind for value in kinds.values()):
        raise ConfigError(f"{where}: {name} has type {kind!r} and rope_type {kinds['rope_type']!r}; leave one out")
    if not isinstance(kind, str) or kind not in ROPE:
        raise ConfigError(f"{where}: {name}.type is {short(kind)}, but this model extends positions with yarn only")
    given = check_keys(rope, ROPE[kind], ("type", "rope_type"), where, f"{name}.")
    theta = given.get("rope_theta", known["rope_theta"])
    if theta != known["rope_theta"] and "rope_theta" in values:
        raise ConfigError(f"{where}: rope_theta is {known['rope_theta']}, but {name}.rope_theta {theta}; leave one out")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: {name}.partial_rotary_factor must be 1: all of qk_rope_head_dim is turned")
    if kind == "default":
        return {"extend_method": "None"}, theta
    return {"extend_method": "YARN", "scaling_factor": yarn_from_hf(given, where, name)}, theta


def yarn_from_hf(given: dict[str, Any], where: str | Path, name: str) -> dict[str, Any]:
    """The `scaling_factor` of checked YaRN keys."""
    for key in ("factor", "original_max_position_embeddings"):
        if key not in given:
            raise ConfigError(
                f"{where}: {name}.{key} is missing; programs assume different ones, so write the one of the training"
            )
    if not given.get("truncate", True):
        raise ConfigError(
            f"{where}: {name}.truncate is false, but this model rounds the correction range outwards only"
        )
    fast, slow = given.get("beta_fast", 32.0), given.get("beta_slow", 1.0)
    if fast < slow:
        raise ConfigError(f"{where}: {name}.beta_fast {fast} must not be below beta_slow {slow}")
    # Without both, cos and sin are multiplied with 0.1 ln(factor) + 1. One alone is ignored by transformers only.
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if not (mscale and all_dim) and (mscale not in (None, 1.0) or all_dim):
        raise ConfigError(
            f"{where}: {name} has mscale {mscale} and mscale_all_dim {all_dim}, of which transformers and DeepSeek's "
            "own code make different numbers; give both, above 0, or neither"
        )
    mscale, all_dim = (mscale, all_dim) if all_dim else (1.0, 0.0)

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(given["factor"]) + 1

    factor, own = given.get("attention_factor"), temperature(mscale) / temperature(all_dim)
    if factor is not None and abs(factor - own) > 1e-6 * own:
        raise ConfigError(
            f"{where}: {name}.attention_factor is {factor}, but this model multiplies cos and sin with {own:.6g} only, "
            "which follows from factor, mscale and mscale_all_dim"
        )
    yarn = {"beta_fast": fast, "beta_slow": slow, "mscale": mscale, "mscale_all_dim": all_dim}
    return {key: given[key] for key in ("factor", "original_max_position_embeddings")} | yarn


def config_from_hf(values: dict[str, Any], mtp_depth: int, where: str | Path = "config.json") -> DeepseekV2Config:
    """The model's configuration object; `mtp_depth` is how many MTP layers the files hold."""
    sections = sections_from_hf(values, where)
    model = {k: v for k, v in sections["model"]["model_config"].items() if k not in ("type", "auto_register")}
    family = FAMILIES[text_model(values, where)["model_type"]]
    length = values.get("max_position_embeddings") or family.max_position_embeddings
    cls = CLASSES[family.cls]
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
    family = config.model_type.replace("deepseek", "deepseek_")
    moe = config.moe_config
    values = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **{theirs: getattr(config, ours) for theirs, ours in MODEL.items()},
        **{theirs: getattr(moe, ours) for theirs, ours in MOE.items()},
        **{key: getattr(config, key) for key in FAMILIES[family].sizes},
        **{key: FIXED[key] for key in WRITTEN_FIXED},
        "num_key_value_heads": config.num_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "scoring_func": "sigmoid" if moe.use_gating_sigmoid else "softmax",
        "num_nextn_predict_layers": mtp_depth,
        "rope_scaling": None,
        "pad_token_id": config.pad_token_id,
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
    family = FAMILIES[values["model_type"]]
    left_out = ("quantization_config", "auto_map", "dtype", "rope_parameters")
    kept = {key: value for key, value in values.items() if key not in left_out}
    right = {
        "architectures": [family.architecture],
        "model_type": family.written_as or values["model_type"],
        "num_nextn_predict_layers": mtp_depth,
        "torch_dtype": dtype,
    }
    if values.get("rope_parameters"):  # transformers 4 and vLLM would not see them; 5 reads both
        rope = dict(values["rope_parameters"])
        theta = rope.pop("rope_theta", values.get("rope_theta", DEFAULTS["rope_theta"]))
        is_default = "default" in (rope.get("rope_type"), rope.get("type"))
        right |= {"rope_theta": theta, "rope_scaling": None if is_default else rope}
    has_experts = "n_routed_experts" not in family.defaults  # vLLM finds the bias by these
    router = {key: family.defaults[key] for key in ("topk_method", "scoring_func")} if has_experts else {}
    return {**router, **kept, **right}


def compare(config: DeepseekV2Config, values: dict[str, Any], where: str | Path) -> None:
    """Refuse a config.json that describes another model than `config`.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    other = config_from_hf(values, config.mtp_depth, where)
    sizes = FAMILIES[text_model(values, where)["model_type"]].sizes if config.has_indexer else ()
    keys = MODEL | dict(zip(sizes, sizes, strict=True))
    pairs = [(theirs, config, other, ours, "model_config") for theirs, ours in keys.items()]
    if config.moe_config.expert_num > 1 or other.moe_config.expert_num > 1:
        pairs += [(theirs, config.moe_config, other.moe_config, ours, "moe_config") for theirs, ours in MOE.items()]
        pairs.append(("scoring_func", config.moe_config, other.moe_config, "use_gating_sigmoid", "moe_config"))
    for theirs, mine, read, ours, section in pairs:
        if theirs not in NOT_WEIGHTS and getattr(mine, ours) != getattr(read, ours):
            there = values.get(theirs, getattr(read, ours))
            raise ConfigError(
                f"{where}: {theirs} is {there!r}, but {section}.{ours} of the YAML is {getattr(mine, ours)!r}; make "
                "the YAML's the same"
            )
    if config.yarn != other.yarn:
        there = values.get("rope_scaling") or values.get("rope_parameters")
        raise ConfigError(
            f"{where}: rope_scaling is {there!r}, but the YAML has extend_method {config.extend_method!r} with "
            f"scaling_factor {config.scaling_factor!r}; make the YAML's the same"
        )
