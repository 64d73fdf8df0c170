"""Every key of transformers' two DeepSeek configurations, one at a time away from what it was: our logits follow
transformers', or the key is refused by name. Float32, eager, tolerance as in test_huggingface.py."""

import inspect
import json

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek2_model import DeepseekV2ForCausalLM
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.hf_reference import HfV2, HfV2Config, HfV3, HfV3Config, load_from_hf, mask_with_minus_infinity
from hf_config import config_from_hf, read_config
from mindspore import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from mindformers_ext.errors import ConfigError

BASE = dict(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=7,
    n_group=4,
    topk_group=2,
    max_position_embeddings=64,
    attn_implementation="eager",
)
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=8,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.0,  # transformers' V2 leaves it out of the softmax scale
)
# Another value of each key than the base's; both differ from the class's default where the logits depend on it.
CHANGED = dict(
    vocab_size=44,
    hidden_size=28,
    intermediate_size=16,
    moe_intermediate_size=10,
    num_hidden_layers=3,
    num_attention_heads=4,
    n_shared_experts=2,
    n_routed_experts=12,
    num_experts_per_tok=2,
    first_k_dense_replace=2,
    kv_lora_rank=6,
    q_lora_rank=None,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=5,
    n_group=2,
    topk_group=3,
    routed_scaling_factor=3.0,
    max_position_embeddings=32,
    rms_norm_eps=0.02,
    rope_theta=300.0,
    rope_scaling=YARN,
    initializer_range=0.5,
    use_cache=False,
    tie_word_embeddings=True,
    pad_token_id=3,
    bos_token_id=5,
    eos_token_id=7,
)
BY_FAMILY = {
    "v2": dict(topk_method="group_limited_greedy", aux_loss_alpha=0.5, seq_aux=False),
    "v3": dict(norm_topk_prob=False, pretraining_tp=2),
}
# What no configuration of ours can say, and what the sentence names.
REFUSED = dict(
    num_key_value_heads=1,
    hidden_act="gelu",
    attention_bias=True,
    attention_dropout=0.1,
)
REFUSED_BY_FAMILY = {
    # DeepSeek's own V2 code normalises these gates and does not scale them; transformers' does the reverse.
    "v2": dict(mlp_bias=True, norm_topk_prob=True),
    "v3": dict(rope_interleave=False),
}
FAMILIES = {
    "v2": (HfV2Config, HfV2, DeepseekV2ForCausalLM),
    "v3": (HfV3Config, HfV3, DeepseekV3ForCausalLM),
}
KEYS = [(f, key) for f in FAMILIES for key in [*CHANGED, *BY_FAMILY[f]]]
NOT_FOLLOWED = [(f, key) for f in FAMILIES for key in [*REFUSED, *REFUSED_BY_FAMILY[f]]]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_key_is_left_out(family):
    signature = inspect.signature(FAMILIES[family][0].__init__).parameters
    known = {key for f, key in [*KEYS, *NOT_FOLLOWED] if f == family}
    assert set(signature) - {"self", "kwargs"} == known


def folder_of(folder, config, **values):
    """config.json as transformers saves it, with values that its class would not take."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


@pytest.mark.parametrize(("family", "key"), KEYS)
def test_logits_follow_transformers(tmp_path, family, key):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    make_config, make_model, make_ours = FAMILIES[family]
    theirs = make_config(**{**BASE, key: {**CHANGED, **BY_FAMILY[family]}[key]} | heads_of(key))
    torch.manual_seed(0)
    reference = make_model(theirs).eval()
    for router in (m for m in reference.modules() if isinstance(m, DeepseekV3TopkRouter)):
        mask_with_minus_infinity(router)
        router.e_score_correction_bias.uniform_(-0.1, 0.1)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.2)

    config = config_from_hf(read_config(folder_of(tmp_path, theirs)), 0)
    config.compute_dtype = "float32"
    network = make_ours(config).set_train(False)
    load_from_hf(network, config, reference)
    ids = np.random.default_rng(0).integers(0, BASE["vocab_size"], (2, 16)).astype(np.int32)
    expected = reference(torch.from_numpy(ids).long()).logits.detach().numpy()
    assert np.abs(network(Tensor(ids)).asnumpy() - expected).max() <= 1e-4


def heads_of(key) -> dict:
    """MLA has as many key/value heads as heads."""
    return {"num_key_value_heads": CHANGED[key]} if key == "num_attention_heads" else {}


@pytest.mark.parametrize(("family", "key"), NOT_FOLLOWED)
def test_what_is_not_followed_is_refused_by_name(tmp_path, family, key):
    value = {**REFUSED, **REFUSED_BY_FAMILY[family]}[key]
    folder = folder_of(tmp_path, FAMILIES[family][0](**BASE), **{key: value})
    with pytest.raises(ConfigError, match=f"{key} is {value!r}, but "):
        config_from_hf(read_config(folder), 0)
