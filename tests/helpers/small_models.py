"""Small configurations the tests share."""

from deepseek2_config import DeepseekV2Config
from deepseek3_config import DeepseekV3Config
from deepseek32_config import DeepseekV32Config

SIZES = dict(
    seq_length=24,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    intermediate_size=80,
    kv_lora_rank=24,
    q_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    vocab_size=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
    compute_dtype="float32",
    mtp_depth=0,
)
MOE = dict(
    expert_num=8,
    num_experts_chosen=3,
    shared_expert_num=1,
    moe_intermediate_size=20,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    use_gmm=True,
)


def v3_config(moe: dict | None = None, **changes) -> DeepseekV3Config:
    """A two-layer DeepSeek-V3; `moe` and `changes` override single values."""
    return DeepseekV3Config(**{**SIZES, **changes}, moe_config={**MOE, **(moe or {})})


def v32_config(moe: dict | None = None, **changes) -> DeepseekV32Config:
    """A two-layer DeepSeek-V3.2; heads enough that no score is 0, so that there is one order of them."""
    indexer = dict(index_n_heads=16, index_head_dim=20, index_topk=7)
    return DeepseekV32Config(**{**SIZES, **indexer, **changes}, moe_config={**MOE, **(moe or {})})


def v2_config(moe: dict | None = None, **changes) -> DeepseekV2Config:
    """A two-layer DeepSeek-V2 with V2-Lite's router (softmax, greedy, gates not normalised)."""
    lite = dict(topk_method="greedy", n_group=None, topk_group=None, routed_scaling_factor=1.0, shared_expert_num=2)
    return DeepseekV2Config(**{**SIZES, **changes}, moe_config={**MOE, **lite, **(moe or {})})
