"""Models on DeepSeek V3's skeleton: what their config.json says, in DeepSeek's words.

hf_config.py reads DeepSeek's words only. A family says which of them its config.json leaves out, and what its own
words mean.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.json_files import short

__all__ = ["FAMILIES", "Family", "text_model"]

V3_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
NO_EXPERTS = {
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "n_shared_experts": None,
    "moe_intermediate_size": None,
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}


def unchanged(values: dict[str, Any], where: Any) -> dict[str, Any]:
    """A config.json in DeepSeek's words already."""
    return values


@dataclass(frozen=True)
class Family:
    """One `model_type`."""

    cls: str  # of ours: DeepseekV2, DeepseekV3 or DeepseekV32
    architecture: str  # transformers' class of an export
    max_position_embeddings: int  # where config.json has none
    defaults: dict[str, Any] = field(default_factory=dict)  # DeepSeek's words that are not in config.json
    no_effect: tuple[str, ...] = ()  # keys of its own that change no number
    in_deepseek_words: Callable[[dict[str, Any], Any], dict[str, Any]] = unchanged
    sizes: tuple[str, ...] = ()  # keys of its own that name a size; ours are called the same
    written_as: str | None = None  # model_type of an export, where transformers 4 does not know this one


def from_glm(values: dict[str, Any], where: Any) -> dict[str, Any]:
    """GLM names the kind of every layer; here the first are dense and all others have experts."""
    layers = values.get("num_hidden_layers")
    kinds = values.get("mlp_layer_types")
    kept = {key: value for key, value in values.items() if key != "mlp_layer_types"}
    if kinds is None:
        return {"first_k_dense_replace": 1, **kept}
    dense = kinds.index("sparse") if isinstance(kinds, list) and "sparse" in kinds else layers
    if not isinstance(layers, int) or kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ConfigError(
            f"{where}: mlp_layer_types is {short(kinds)}, but must be 'dense' for the first layers and 'sparse' for "
            "all others, num_hidden_layers in all"
        )
    return {**kept, "first_k_dense_replace": dense}


def from_youtu(values: dict[str, Any], where: Any) -> dict[str, Any]:
    """Youtu has no experts; without initializer_range it follows from the width (configuration_youtu.py)."""
    found = {"first_k_dense_replace": values.get("num_hidden_layers"), "tie_word_embeddings": True, **values}
    hidden = values.get("hidden_size")
    if found.get("initializer_range") is None and isinstance(hidden, int) and hidden > 0:
        found["initializer_range"] = 2.0 / (5.0 * hidden) ** 0.5
    return found


SPARSE_LAYERS = {"indexed_attention", "deepseek_sparse_attention"}  # one word or the other, by transformers' version


def from_v32(values: dict[str, Any], where: Any) -> dict[str, Any]:
    """transformers 5 names the kind of every layer's attention, too: all are sparse."""
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or not set(kinds) <= SPARSE_LAYERS):
        raise ConfigError(f"{where}: layer_types is {short(kinds)}, but this model has sparse attention in every layer")
    kept = {key: value for key, value in values.items() if key != "layer_types"}
    return from_glm(kept, where) if kept.get("mlp_layer_types") is not None else kept


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2", "DeepseekV2ForCausalLM", 2048, {"topk_method": "greedy", "scoring_func": "softmax"}
    ),
    "deepseek_v3": Family("DeepseekV3", "DeepseekV3ForCausalLM", 4096, V3_ROUTER),
    "deepseek_v32": Family(
        "DeepseekV32",
        "DeepseekV32ForCausalLM",
        163840,
        V3_ROUTER,
        ("output_router_logits",),
        from_v32,
        ("index_n_heads", "index_head_dim", "index_topk"),
    ),
    "kimi_k2": Family("DeepseekV3", "DeepseekV3ForCausalLM", 4096, V3_ROUTER, written_as="deepseek_v3"),
    "glm4_moe_lite": Family(
        "DeepseekV3",
        "Glm4MoeLiteForCausalLM",
        202752,
        V3_ROUTER | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        ("output_router_logits",),
        from_glm,
    ),
    "youtu": Family(
        "DeepseekV3",
        "YoutuForCausalLM",
        131072,
        V3_ROUTER | NO_EXPERTS,
        ("embedding_initializer_range",),
        from_youtu,
    ),
}
# Models that read more than text: their language model is one of the above, under text_config.
AROUND_TEXT = ("kimi_k25",)


def text_model(values: dict[str, Any], where: Any) -> dict[str, Any]:
    """The language model's part of a config.json.

    Raises:
        ConfigError: it describes no family that is known here.
    """
    family = values.get("model_type")
    if family in AROUND_TEXT and isinstance(values.get("text_config"), dict):
        quantization = values.get("quantization_config")  # written beside text_config or in it
        inner = {"quantization_config": quantization} if quantization is not None else {}
        return text_model({**inner, "model_type": "deepseek_v3", **values["text_config"]}, f"{where}: text_config")
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join([*FAMILIES, *AROUND_TEXT])
        raise ConfigError(f"{where}: model_type is {short(family)}, but must be one of {known}")
    return values
