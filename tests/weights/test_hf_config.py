"""config.json to the YAML's sections and back."""

import json

import pytest
from deepseek3_config import DeepseekV3Config
from helpers.hf_folders import V2_LITE_CONFIG, V3_CONFIG
from helpers.small_models import v2_config, v3_config
from hf_config import compare, config_from_hf, config_to_hf, corrected, read_config, sections_from_hf
from transformers import AutoConfig

from mindformers_ext.errors import ConfigError

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
    "tied": ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2, but must be True or False"),
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
