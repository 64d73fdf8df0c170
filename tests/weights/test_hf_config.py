"""config.json to the YAML's sections and back."""

import json
import math

import numpy as np
import pytest
import torch
from deepseek3_config import DeepseekV3Config
from helpers.hf_folders import V2_LITE_CONFIG, V3_CONFIG
from helpers.small_models import v2_config, v3_config
from hf_config import (
    KEYS,
    MODEL,
    MOE,
    NO_EFFECT,
    OFF,
    compare,
    config_from_hf,
    config_to_hf,
    corrected,
    read_config,
    sections_from_hf,
)
from rope import rope_tables, softmax_scale
from transformers import AutoConfig
from transformers import DeepseekV2Config as HfV2Config
from transformers import DeepseekV3Config as HfV3Config
from transformers import DeepseekV3ForCausalLM as HfV3
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from mindformers_ext.config.yaml_files import merge
from mindformers_ext.errors import ConfigError

# An error of the model's own names its own key; V3's normalised gates make no V2.
OURS = {**dict.fromkeys(KEYS, "?"), **MODEL, **MOE, "model_type": "norm_topk_prob"}

YARN = dict(
    extend_method="YARN",
    scaling_factor=dict(factor=40.0, original_max_position_embeddings=8, beta_fast=32, beta_slow=1, mscale=0.7),
    max_position_embeddings=320,
)
RELEASED_V3 = {  # deepseek-ai/DeepSeek-V3, the keys that say what the model is
    **V3_CONFIG,
    **dict(hidden_size=7168, intermediate_size=18432, kv_lora_rank=512, moe_intermediate_size=2048, n_group=8),
    **dict(n_routed_experts=256, num_attention_heads=128, num_key_value_heads=128, num_experts_per_tok=8),
    **dict(num_hidden_layers=61, first_k_dense_replace=3, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64),
    **dict(topk_group=4, v_head_dim=128, vocab_size=129280, max_position_embeddings=163840),
    "rope_scaling": {**V3_CONFIG["rope_scaling"], "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize("make", ["v3", "v3_yarn", "v3_mtp", "v3_tied", "v2", "v2_q_lora"])
def test_ours_to_theirs_and_back(make):
    config = {
        "v3": v3_config(),
        "v3_yarn": v3_config(**YARN),
        "v3_mtp": v3_config(mtp_depth=1),
        "v3_tied": v3_config(tie_word_embeddings=True),
        "v2": v2_config(q_lora_rank=None),
        "v2_q_lora": v2_config(moe=dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)),
    }[make]
    values = json.loads(json.dumps(config_to_hf(config, config.mtp_depth)))
    back = config_from_hf(values, config.mtp_depth)
    ours_alone = ("seq_length", "max_position_embeddings", "scaling_factor", "compute_dtype", "moe_config")
    one, other = ({k: v for k, v in c.to_dict().items() if k not in ours_alone} for c in (config, back))
    assert one == other and config.yarn == back.yarn
    assert config.moe_config.to_dict() == back.moe_config.to_dict()
    compare(config, values, "config.json")


def test_released_model_and_what_transformers_makes_of_the_export(tmp_path):
    sections = sections_from_hf(RELEASED_V3)
    assert (
        sections["model"]["model_config"] | {"num_layers": 61, "num_heads": 128, "mtp_depth": 1, "theta": 10000}
        == (sections["model"]["model_config"])
    )
    assert sections["model"]["arch"]["auto_register"] == "deepseek3_model.DeepseekV3ForCausalLM"
    config = config_from_hf(RELEASED_V3, 1)
    assert (config.extend_method, config.yarn.factor, config.moe_config.expert_num) == ("YARN", 40, 256)
    default = DeepseekV3Config()
    for key in ("hidden_size", "num_layers", "kv_lora_rank", "q_lora_rank", "vocab_size", "intermediate_size"):
        assert getattr(config, key) == getattr(default, key), key

    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, 0)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_scaling["rope_type"] == "yarn" and theirs.num_nextn_predict_layers == 0
    assert (theirs.topk_method, theirs.scoring_func) == ("noaux_tc", "sigmoid")  # vLLM finds the bias by these
    for key, value in RELEASED_V3.items():
        if key not in ("quantization_config", "rope_scaling", "num_nextn_predict_layers", "torch_dtype"):
            assert getattr(theirs, key) == value, key


def test_a_given_config_is_corrected_for_export():
    right = corrected({**V3_CONFIG, "auto_map": {"AutoConfig": "x.y"}}, 0, "float32")
    assert "quantization_config" not in right and "auto_map" not in right
    assert right["num_nextn_predict_layers"] == 0 and right["torch_dtype"] == "float32"
    plain = {key: value for key, value in V3_CONFIG.items() if key not in ("topk_method", "scoring_func")}
    right = corrected(plain, 1, "bfloat16")
    assert (right["topk_method"], right["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert right["rope_scaling"] == V3_CONFIG["rope_scaling"]
    assert corrected(V2_LITE_CONFIG, 0, "bfloat16")["architectures"] == ["DeepseekV2ForCausalLM"]


BAD = {
    "family": ({"model_type": "llama"}, "model_type is 'llama'"),
    "tied": ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2: expected `bool`"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "bias": ({"attention_bias": True}, "attention_bias is True"),
    "scores": ({"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
    "rope": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type is 'linear'"),
    "group": ({"topk_group": 9}, "topk_group is 9, but a token can use at most n_group"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_of_another_model_is_refused(tmp_path, name):
    change, message = BAD[name]
    (tmp_path / "config.json").write_text(json.dumps({**V3_CONFIG, **change}))
    with pytest.raises(ConfigError, match=message):
        config_from_hf(read_config(tmp_path), 1, tmp_path / "config.json")


YARN_KEYS = V3_CONFIG["rope_scaling"]


def rope(**changes) -> dict:
    """rope_scaling of V3_CONFIG with changes; a key whose value is ... is left out."""
    return {key: value for key, value in {**YARN_KEYS, **changes}.items() if value is not ...}


def plain(**changes) -> dict:
    """V3_CONFIG with changes; a key whose value is ... is left out."""
    return {key: value for key, value in {**V3_CONFIG, **changes}.items() if value is not ...}


POSITIONS = {
    "yarn": plain(),
    "no_yarn": plain(rope_scaling=None, rope_theta=500.0),
    "no_temperatures": plain(rope_scaling=rope(mscale=..., mscale_all_dim=...)),
    "cos_only": plain(rope_scaling=rope(mscale=1.0, mscale_all_dim=0)),
    "different": plain(rope_scaling=rope(mscale=0.7, mscale_all_dim=1.3, factor=4, beta_fast=...)),
    "one_range": plain(rope_scaling=rope(beta_fast=1.0, original_max_position_embeddings=4096, factor=32)),
    "both_names": plain(rope_scaling=rope(rope_type="yarn", truncate=True, attention_factor=None)),
    "theta": plain(rope_theta=50000.0, qk_rope_head_dim=64),
    "own_factor": plain(rope_scaling=rope(mscale=..., mscale_all_dim=..., attention_factor=0.1 * math.log(40) + 1)),
    "default": plain(rope_scaling={"rope_type": "default"}),
    "v5_yarn": plain(rope_scaling=..., rope_theta=..., rope_parameters=rope(rope_theta=700.0)),
    "v5_default": plain(rope_scaling=..., rope_theta=..., rope_parameters=dict(rope_type="default", rope_theta=700.0)),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_equal_transformers(name):
    """cos, sin and the scale of attention, of every accepted spelling and combination of options."""
    values = POSITIONS[name]
    config = config_from_hf(values, 0)
    right = corrected(values, 0, "float32")  # what an export says, which transformers 4.57 reads
    kind = {"yarn"} & {(right["rope_scaling"] or {}).get(key) for key in ("type", "rope_type")}
    theirs = HfV3Config(**{**right, "rope_scaling": right["rope_scaling"] if kind else None})
    cos, sin = rope_tables(config)
    expected = DeepseekV3RotaryEmbedding(theirs)(torch.zeros(1), torch.arange(len(cos))[None])
    half = cos.shape[1] // 2
    for ours, other in zip((cos, sin), expected, strict=True):
        np.testing.assert_allclose(ours[:, ::2], other[0, :, :half].numpy(), atol=2e-4)  # float32 angles there
    attention = DeepseekV3Attention(theirs, 0)
    assert softmax_scale(config) == pytest.approx(attention.scaling, rel=1e-6)


REFUSED_ROPE = {
    "attention_factor": (rope(attention_factor=1.7), "attention_factor is 1.7, but this model multiplies"),
    "truncate": (rope(truncate=False), "truncate is false"),
    "truncate_null": (rope(truncate=None), "truncate is None"),
    "no_original": (rope(original_max_position_embeddings=...), "original_max_position_embeddings is missing"),
    "no_factor": (rope(factor=...), "factor is missing"),
    "small_factor": (rope(factor=0.5), "factor is 0.5"),
    "text_factor": (rope(factor="40"), "factor is '40'"),
    "one_temperature": (rope(mscale=..., mscale_all_dim=0.7), "mscale None and mscale_all_dim 0.7"),
    "other_temperature": (rope(mscale=0.7, mscale_all_dim=...), "mscale 0.7 and mscale_all_dim None"),
    "no_cos": (rope(mscale=0, mscale_all_dim=0), "mscale 0.0 and mscale_all_dim 0.0"),
    "betas": (rope(beta_fast=1, beta_slow=2), "beta_fast 1.0 must not be below beta_slow 2.0"),
    "unknown": (rope(short_factor=[1.0]), "short_factor .* is an unknown key"),
    "partial": (rope(partial_rotary_factor=0.5), "partial_rotary_factor must be 1"),
    "theta": (rope(rope_theta=5.0), "rope_theta is 10000.0, but rope_scaling.rope_theta 5.0"),
    "two_types": (rope(rope_type="default"), "type 'yarn' and rope_type 'default'"),
    "no_type": (rope(type=...), "rope_scaling.type is None"),
    "empty": ({}, "rope_scaling.type is None"),
    "linear": ({"rope_type": "linear", "factor": 2.0}, "rope_scaling.type is 'linear'"),
    "dynamic": (rope(type="dynamic"), "rope_scaling.type is 'dynamic'"),
    "default_with_factor": ({"type": "default", "factor": 2.0}, "factor .* is an unknown key"),
}


@pytest.mark.parametrize("name", REFUSED_ROPE)
def test_positions_that_this_model_does_not_have_are_named(name):
    given, message = REFUSED_ROPE[name]
    with pytest.raises(ConfigError, match=message):
        sections_from_hf(plain(rope_scaling=given))
    if name != "theta":
        named = message.replace("rope_scaling", "rope_parameters")
        with pytest.raises(ConfigError, match=named):
            sections_from_hf(plain(rope_scaling=..., rope_parameters=given))
    with pytest.raises(ConfigError, match="but rope_parameters"):
        sections_from_hf(plain(rope_parameters=rope(factor=2.0)))


@pytest.mark.parametrize("cls", [HfV2Config, HfV3Config])
def test_every_key_of_transformers_is_known(cls):
    """What save_pretrained writes is read; a key that a later version adds is refused until somebody looks at it."""
    known = {*KEYS, *NO_EFFECT, *OFF}
    assert set(cls().to_dict()) <= known
    values = json.loads(json.dumps(cls(num_nextn_predict_layers=0).to_dict() | {"moe_layer_freq": 1}))
    if cls is HfV2Config:
        values["num_experts_per_tok"] = 6
    assert config_from_hf(values, 0).vocab_size == values["vocab_size"]
    with pytest.raises(ConfigError, match="router_aux_x .0.1. is an unknown key"):
        config_from_hf({**values, "router_aux_x": 0.1}, 0)


OTHERS = {
    "max_position_embeddings": 640,
    "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "quantization_config": {"quant_method": "awq"},
    "hidden_act": "gelu",
    "num_experts_per_tok": 4,
    "n_group": 2,
    "topk_group": 3,
    "n_routed_experts": 24,
    "first_k_dense_replace": 2,
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_away_from_its_value_changes_the_model_or_is_refused(key):
    """Nothing that is known to matter is passed over."""

    def read(values: dict) -> tuple:
        return sections_from_hf(values), config_from_hf(values, 0).to_dict()

    value = V3_CONFIG.get(key)
    other = OTHERS[key] if key in OTHERS else not value if isinstance(value, bool) else (value or 0) * 2 + 2
    try:
        assert read({**V3_CONFIG, key: other}) != read(V3_CONFIG)
    except ConfigError as error:
        assert any(words in str(error) for words in (key, OURS[key], "which follows from other keys"))


WRONG = [None, -1, "x", [], {}, 1e99, True, 1.5, 0, 10**30, [1], {"a": 1}, float("inf"), float("nan")]


@pytest.mark.parametrize("value", WRONG, ids=str)
@pytest.mark.parametrize("section", ["", "rope_scaling", "rope_parameters", "quantization_config"])
def test_every_value_replaced_is_read_or_refused(section, value):
    """No traceback; and what is accepted is the model's own kind of value."""
    base = plain(rope_scaling=..., rope_parameters=rope()) if section == "rope_parameters" else V3_CONFIG
    inner = base[section] if section else {**dict.fromkeys((*KEYS, *OFF), None), **base}
    for key in inner:
        changed = {**base, section: {**inner, key: value}} if section else {**base, key: value}
        try:
            config = config_from_hf(changed, 0, "here/config.json")
        except ConfigError as error:
            assert "here/config.json" in str(error)
        else:
            sizes = {name: getattr(config, name) for name in ("hidden_size", "num_layers", "theta", "rms_norm_eps")}
            assert all(type(size) in (int, float) and 0 < size < 1e12 for size in sizes.values()), (key, sizes)


@pytest.mark.parametrize("content", [b"[]", b"-1", b"\xff\xfe", b"{", b'{"a":' * 100_000, b'{"rope_theta": Infinity}'])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=str(tmp_path / "config.json")):
        read_config(tmp_path)


def test_keys_without_effect_change_no_logit_of_transformers():
    """Those of DeepSeek's own, each away from its default."""
    small = {key: value for key, value in V3_CONFIG.items() if key != "quantization_config"}
    ids = torch.arange(2, 20)[None]

    def logits(**changes) -> torch.Tensor:
        torch.manual_seed(0)
        model = HfV3(HfV3Config(**{**small, **changes})).eval()
        return model(ids).logits

    expected = logits()
    for change in ({"aux_loss_alpha": 9.0}, {"seq_aux": False}, {"ep_size": 8}, {"pretraining_tp": 4}):
        assert next(iter(change)) in NO_EFFECT
        assert torch.equal(logits(**change), expected), change
    for change in ({"use_cache": False}, {"temperature": 3.0}, {"dtype": "float16"}):
        assert torch.equal(logits(**change), expected), change


def test_null_groups_are_written_for_a_yaml_underneath():
    """`base_config` keeps what the file on top leaves out."""
    sections = sections_from_hf(plain(n_group=None, topk_group=None, n_shared_experts=None, q_lora_rank=None))
    assert [sections["moe_config"][key] for key in ("n_group", "topk_group", "shared_expert_num")] == [1, 1, 0]
    assert sections["model"]["model_config"]["q_lora_rank"] is None
    below = {"n_group": 8, "topk_group": 4, "shared_expert_num": 2, "expert_num": 256}
    assert merge(below, sections["moe_config"])["n_group"] == 1


def test_an_export_of_transformers_5_positions_is_read_by_4(tmp_path):
    values = POSITIONS["v5_yarn"]
    (tmp_path / "config.json").write_text(json.dumps(corrected(values, 0, "float32")))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert (theirs.rope_theta, theirs.rope_scaling["factor"]) == (700.0, 40)
    assert config_from_hf(read_config(tmp_path), 0).yarn == config_from_hf(values, 0).yarn


def test_a_missing_size_is_named():
    values = {key: value for key, value in V3_CONFIG.items() if key != "kv_lora_rank"}
    with pytest.raises(ConfigError, match="kv_lora_rank is missing"):
        sections_from_hf(values)


def test_differences_from_the_yaml_are_named():
    values = config_to_hf(v3_config(), 0)
    with pytest.raises(
        ConfigError, match="num_experts_per_tok is 4, but moe_config.num_experts_chosen of the YAML is 3"
    ):
        compare(v3_config(), {**values, "num_experts_per_tok": 4}, "config.json")
    with pytest.raises(ConfigError, match="scoring_func is 'softmax', but moe_config.use_gating_sigmoid"):
        compare(v3_config(), {**values, "scoring_func": "softmax"}, "config.json")
    with pytest.raises(ConfigError, match="rope_scaling is None, but the YAML has extend_method 'YARN'"):
        compare(v3_config(**YARN), values, "config.json")
